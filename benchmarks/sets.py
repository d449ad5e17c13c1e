"""The cases of each benchmark set, most important first: a time budget cuts from the end."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# (width, vocabulary) of the heads that people train
SHAPES = {
    "Llama-3.1-8B": (4096, 128256),
    "Qwen2.5-1.5B": (1536, 151936),
    "Qwen2.5-7B": (3584, 152064),
    "Gemma-2-2B": (2304, 256000),
}
SMALL = ("risk", "advantage", "surrogate", "linear_divergence", "few_columns")
FAMILY = ("riskpo_kernels", "plain", "TRL")  # where a case repeats a comparison in another regime
RIVALS = (*FAMILY, "Liger fused scaled", "Cut Cross", "F.linear_cross_entropy")


@dataclass(frozen=True)
class Case:
    """One call of harness.run_case; `only` names parts of provider names, empty for all; with
    `compile` also those that compile for long."""

    op: str
    name: str
    sizes: dict[str, Any]
    only: tuple[str, ...] = ()
    compile: bool = False


def quick() -> list[Case]:
    """Every module once, tiny: does it run?"""
    head = _head("tiny", 128, 256, 2048, "float32", "rl", only=("riskpo", "plain", "TRL", "torch"))
    ops = ("risk", "advantage", "linear_divergence", "few_columns")
    small = [Case(op, "first case", {}, ()) for op in ops]
    return [
        head,
        _head("tiny", 128, 256, 2048, "float32", "flat", phase="forward", only=FAMILY),
        _head("tiny", 128, 256, 2048, "float32", "rl", masked=0.5, only=FAMILY),
        _fused("tiny", 128, 256, 2048, "float32", only=("riskpo", "plain")),
        _logits("tiny", 128, 2048, "float32"),
        _step("tiny", 16, 64, 2, 2048, "float32"),
        *small,
    ]


def cpu() -> list[Case]:
    """About six minutes on two quiet cores."""
    shape = ("D1024 V16k", 1024, 1024, 16384, "float32")
    ours = ("riskpo_kernels, tail", "plain")
    return [
        _head(*shape, "rl", compile=True),
        *(_head(*shape, regime, only=FAMILY[:2]) for regime in ("rl-late", "sft", "flat")),
        _head(*shape, "rl", zero=0.5, only=FAMILY),
        _head(*shape, "rl", masked=0.5, only=FAMILY),
        _head(*shape, "rl", phase="forward", only=RIVALS),
        _head(*shape, "rl", phase="forward+backward with entropy", only=FAMILY),
        _fused(*shape),
        _logits("V16k", 1024, 16384, "float32"),
        _logits("V16k", 1024, 16384, "float32", phase="forward"),
        _step("4 layers", 64, 256, 4, 32768, "float32"),
        *(Case(op, "first case", {}) for op in SMALL[:3]),
        *(Case(op, "every case", {}) for op in SMALL[3:]),
        *(
            _head("D256 V8k", n, 256, 8192, "float32", "rl", only=(*ours, "TRL"))
            for n in (1024, 4096, 16_384, 32_768, 65_536)
        ),
    ]


def pretrained(regimes: list[tuple[str, int, int]]) -> list[Case]:
    """Heads of pretrained models beside every peer: benchmarks/real_rows.py."""
    cases = [_head(f"D{d} V{v}", 1024, d, v, "float32", name) for name, d, v in regimes]
    first = regimes[:1]
    return cases + [
        _head(f"D{d} V{v}", 1024, d, v, "float32", name, phase="forward", only=RIVALS)
        for name, d, v in first
    ]


def gpu() -> list[Case]:
    """Shapes of real models in bfloat16; the first dozen cases carry the goals."""
    llama = _shape("Llama-3.1-8B")
    qwen = _shape("Qwen2.5-1.5B")
    seven, gemma = _shape("Qwen2.5-7B"), _shape("Gemma-2-2B")
    both = (qwen, llama)
    cases = [_head(*llama(16384), "rl", compile=True), _head(*qwen(16384), "rl", compile=True)]
    cases += [_head(*s(16384), "flat", only=RIVALS) for s in both]
    cases += [_head(*s(16384), "rl", phase="forward", only=RIVALS) for s in both]
    cases += [_head(*s(2048), "rl", phase="forward", only=FAMILY[:2]) for s in both]
    cases += [
        _head(*qwen(16384), "rl", zero=0.5, only=FAMILY),
        _head(*qwen(16384), "rl", masked=0.5, only=RIVALS),
        _head(*qwen(16384), "sft", only=RIVALS),
        _head(*qwen(16384), "rl-late", only=FAMILY),
        _head(*qwen(16384), "rl", phase="forward+backward with entropy", only=RIVALS),
        _fused(*qwen(16384)),
        _logits("V152k", 8192, 151936, "bfloat16"),
        _logits("V152k", 8192, 151936, "bfloat16", phase="forward"),
        _step("0.5B", 1024, 896, 24, 151936, "bfloat16"),
        Case("stream", "20 lengths", {"d": 1536, "v": 151936, "dtype": "bfloat16", "most": 8192}),
    ]
    cases += [Case(op, "first case", {}) for op in SMALL]
    cases += [_head(*qwen(n), "rl", only=RIVALS) for n in (1024, 4096, 65536, 8192, 2048, 32768)]
    cases += [_head(*llama(n), r, only=FAMILY) for n in (65536, 8192) for r in ("rl", "flat")]
    cases += [_head(*s(8192), r, only=RIVALS) for s in (seven, gemma) for r in ("rl", "flat")]
    cases += [_head(*llama(16384), "rl", zero=0.5, only=FAMILY)]
    cases += [Case(op, "every case", {}) for op in ("surrogate", *SMALL[3:])]
    cases += [_head(*qwen(262144), "rl", only=("riskpo_kernels", "TRL"))]
    return cases


def dry() -> list[Case]:
    """The GPU run's cases shrunk to a CPU's patience; every line of the script, no meaning."""
    small = {"d": 256, "v": 2048, "dtype": "float32", "most": 64}
    small |= {"tokens_each": 8, "width": 64, "layers": 1, "vocab": 2048}

    def shrink(sizes: dict[str, Any]) -> dict[str, Any]:
        less = {k: small.get(k, x) for k, x in sizes.items()}
        return less | ({"n": max(16, sizes["n"] // 512)} if "n" in sizes else {})

    cases = [
        dataclasses.replace(c, name=f"shrunk {c.name}", sizes=shrink(c.sizes))
        for c in gpu()
        if c.sizes
    ]
    return cases + [Case(op, "first case", {}) for op in SMALL]


SETS = {"cpu": cpu, "quick": quick, "gpu": gpu, "dry": dry}


def _shape(model: str):
    d, v = SHAPES[model]
    return lambda n: (model, n, d, v, "bfloat16")


def _head(
    label: str,
    n: int,
    d: int,
    v: int,
    dtype: str,
    regime: str,
    *,
    zero: float = 0.0,
    masked: float = 0.0,
    phase: str = "forward+backward",
    only: tuple[str, ...] = (),
    compile: bool = False,
) -> Case:
    sizes = {"n": n, "d": d, "v": v, "dtype": dtype, "regime": regime}
    sizes |= {"zero_fraction": zero, "masked_fraction": masked, "phase": phase}
    parts = [f"{label}, N={n}", regime]
    parts += [f"{zero:.0%} zero rows"] * bool(zero) + [f"{masked:.0%} masked rows"] * bool(masked)
    return Case("linear_logprob", ", ".join([*parts, phase]), sizes, only, compile)


def _fused(label: str, n: int, d: int, v: int, dtype: str, *, only: tuple[str, ...] = ()) -> Case:
    sizes = {"n": n, "d": d, "v": v, "dtype": dtype, "regime": "rl", "zero_fraction": 0.5}
    return Case("fused", f"{label}, N={n}, rl, 50% zero rows", sizes, only)


def _logits(label: str, n: int, v: int, dtype: str, phase: str = "forward+backward") -> Case:
    sizes = {"n": n, "v": v, "dtype": dtype, "regime": "rl", "phase": phase}
    return Case("logits_logprob", f"{label}, N={n}, {phase}", sizes)


def _step(label: str, tokens: int, width: int, layers: int, vocab: int, dtype: str) -> Case:
    sizes = {"tokens_each": tokens, "width": width, "layers": layers, "vocab": vocab}
    return Case("step", f"{label}, 20 responses of {tokens}", sizes | {"dtype": dtype})

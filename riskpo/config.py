"""Every setting of a run, in one place; units are in the names.

Precedence: defaults < TOML file < command line. A setting left at None is filled in once, by
`resolve`, from DEMO (nothing given: the embedded task) or REAL (your model and your data); the
settings of the algorithm stay None where the row of riskpo/algorithms.py decides.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class MemoryConfig:
    """What is spent on activations, optimiser and head; every switch trades time for memory."""

    checkpointing: bool = False  # recompute each layer's activations in the backward
    offload_checkpoints: bool = False  # what checkpointing keeps waits in pinned host memory
    mlp_tile_tokens: int = 0  # tokens of an MLP at a time; 0: all of them
    optimizer: str = "device"  # where its state is: device, host, or 8bit (needs bitsandbytes)
    attention: str = "auto"  # of packed rows: auto, flash, varlen, sequences, masked
    skip_zero_advantage: bool = True  # they stay out of the update, unless entropy_coef is set
    head_mib: int = 300  # workspace of the fused head
    sharded: bool = False  # several processes: FSDP2, each holds its shard of all states


@dataclass(frozen=True)
class SamplerConfig:
    """Who samples the responses, and what is done about its log-probs not being the trainer's."""

    engine: str = "generate"  # generate (transformers), or vllm
    sequences: int = 512  # responses that are sampled at once
    static_cache: bool = False  # of generate: fixed size; transformers compiles decoding on CUDA
    gpu_share: float = 0.4  # of the memory, which vllm may fill while it is awake
    correction: str = "none"  # none, tis (truncated weights) or mis (masked weights)
    level: str = "token"  # of the weights: token or sequence
    cap: float = 2.0  # of trainer / sampler probability


@dataclass(frozen=True)
class LoraConfig:
    """Adapters beside frozen weights (peft); rank 0 trains all weights."""

    rank: int = 0
    alpha: int = 32
    targets: tuple[str, ...] = ("all-linear",)  # names of layers; never the head


@dataclass(frozen=True)
class ColumnsConfig:
    """Names of your data's columns, where their form is not recognised; "a.b": b inside a."""

    question: str | None = None  # text, or a list of messages
    gold: str | None = None  # the reference answer
    id: str | None = None  # None: a hash of the question


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `riskpo train`; a group is a table in TOML and `--group.name` on the line."""

    run_dir: str = "runs/demo"  # everything a run writes goes here; the same folder resumes
    algorithm: str = "riskpo-paper"  # a row of riskpo/algorithms.py
    model: str | None = None  # folder or hub name of a causal LM; None: the embedded tiny model
    data: str | None = None  # file, hub name, or embedded:mixed, :large, :tiny; None: the demo's
    eval_data: str | None = None  # None: a held-out part of data
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    reward: str = "auto"  # auto, math, code, exact, your "module:function" or "file.py:function"
    seed: int = 0
    steps: int = 300

    questions_per_step: int = 40
    responses_per_question: int = 8
    updates_per_step: int = 1  # mini-batches per batch of rollouts; above 1 is off-policy
    micro_batch_tokens: int | None = None  # packed tokens that go through the model at once

    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    temperature: float = 1.0

    learning_rate: float | None = None
    warmup_steps: int = 20  # of the learning rate, in optimiser steps
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    entropy_coef: float = 0.0

    bundle_size: int | None = None
    omega: float | None = None
    alpha: float | None = None
    beta: float | None = None
    baseline: str | None = None
    scale: str | None = None
    credit: str | None = None
    clip_low: float | None = None
    clip_high: float | None = None

    backend: str = "auto"  # of the fused loss: auto, triton, torch, reference
    dtype: str = "float32"  # of the weights: float32, or bfloat16 with float32 master weights
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    eval_every_steps: int = 100
    eval_questions: int = 200
    eval_samples: int = 8  # avg@k with k = this
    save_every_steps: int = 100
    log_texts: int = 8  # responses of each step that are kept in run_dir/rollouts.jsonl
    log_with: tuple[str, ...] = ()  # besides JSONL: tensorboard, wandb, trackio
    verifier_seconds: float = 5.0  # wall clock per answer


# Four digits of an embedded answer and its end leave room to ramble below eight.
DEMO = {
    "learning_rate": 3e-4,
    "micro_batch_tokens": 512,
    "max_prompt_tokens": 16,
    "max_response_tokens": 8,
}
REAL = {
    "learning_rate": 1e-6,
    "micro_batch_tokens": 16384,
    "max_prompt_tokens": 512,
    "max_response_tokens": 1024,
}
# What the paper's row needs in order to learn within the demo's few minutes (docs/demo.md).
DEMO_OVERRIDES = {"riskpo-paper": {"baseline": "leave-one-out"}}

DTYPES = ("float32", "bfloat16")
IN_FLIGHT = 2  # layer inputs at once on their way to the host, under memory.offload_checkpoints
ATTENTIONS = ("auto", "flash", "varlen", "sequences", "masked")
# May differ from the saved run's: what changes no number of a step, and what its roundings.
FREE_ON_RESUME = (
    "steps", "save_every_steps", "log_texts", "log_with", "eval_every_steps", "eval_samples",
    "sampler.gpu_share", "memory.sharded", "memory.checkpointing", "memory.offload_checkpoints",
)  # fmt: skip
CHANGES_BITS = (
    "micro_batch_tokens", "backend", "verifier_seconds", "sampler.sequences",
    "sampler.static_cache", "memory.mlp_tile_tokens", "memory.optimizer", "memory.attention",
    "memory.skip_zero_advantage", "memory.head_mib",
)  # fmt: skip


def resolve(config: TrainConfig) -> tuple[TrainConfig, dict[str, Any]]:
    """The config with every None of DEMO or REAL filled in, and the demo's overrides of its row.

    An override given by the user wins over the demo's.
    """
    demo = config.model is None and config.data is None
    given = {k: v for k, v in vars(config).items() if v is not None}
    overrides = DEMO_OVERRIDES.get(config.algorithm, {}) if demo else {}
    overrides = {k: v for k, v in overrides.items() if k not in given}
    filled = {**(DEMO if is_embedded(config.data) else REAL), **overrides, **given}
    return dataclasses.replace(config, **filled), overrides


def is_embedded(data: str | None) -> bool:
    """Whether the questions are made here: a name of riskpo.demo.TASKS, or None."""
    return data is None or data.partition(":")[0] == "embedded"


def validate(config: TrainConfig) -> None:
    """ValueError, with what came, what was expected and what to do, on anything that cannot run."""
    c = config
    if c.model is None and not is_embedded(c.data) or c.model is not None and c.data is None:
        missing = "model" if c.model is None else "data"
        reject(
            f"{missing}=None beside the other", "both model and data, or neither", f"Set {missing}."
        )
    _choice("backend", c.backend, ("auto", "triton", "torch", "reference"))
    _choice("dtype", c.dtype, DTYPES)
    _choice("memory.optimizer", c.memory.optimizer, ("device", "host", "8bit"))
    _choice("memory.attention", c.memory.attention, ATTENTIONS)
    if c.memory.offload_checkpoints and not c.memory.checkpointing:
        reject(
            "memory.offload_checkpoints without memory.checkpointing",
            "both, since it is the checkpoints that move",
            "Set memory.checkpointing.",
        )
    _choice("sampler.engine", c.sampler.engine, ("generate", "vllm"))
    _choice("sampler.correction", c.sampler.correction, ("none", "tis", "mis"))
    _choice("sampler.level", c.sampler.level, ("token", "sequence"))
    needs_files = {"sampler.engine='vllm'": c.sampler.engine == "vllm", "lora.rank": c.lora.rank}
    for name, wanted in needs_files.items():
        if wanted and c.model is None:
            reject(f"{name} with the embedded model", "a model on disk or a hub", "Set model.")
    check_columns(c.columns)
    for name in c.log_with:
        _choice("log_with", name, ("tensorboard", "wandb", "trackio"))
    for name, value in flat(c).items():
        _check_number(name, value)
    if c.questions_per_step % c.updates_per_step:
        reject(
            f"questions_per_step={c.questions_per_step} with updates_per_step={c.updates_per_step}",
            "a multiple, since mini-batches are made of whole questions",
            "Change one of them.",
        )


def check_columns(columns: ColumnsConfig) -> None:
    """ValueError for one of question and gold without the other."""
    if (columns.question is None) != (columns.gold is None) or columns.id and not columns.gold:
        reject(
            f"columns.question={columns.question!r} with columns.gold={columns.gold!r}",
            "both, or neither",
            "Name the column of the question and that of its answer.",
        )


def flat(config: TrainConfig) -> dict[str, Any]:
    """Every setting by its full name, `memory.checkpointing` for one of a group."""
    return _flattened(dataclasses.asdict(config))


def _flattened(given: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in given.items():
        inner = value if isinstance(value, dict) else {}
        found |= {f"{name}.{k}": v for k, v in inner.items()} or {name: value}
    return found


_MAY_BE_ZERO = (
    "seed", "warmup_steps", "weight_decay", "entropy_coef", "omega", "alpha", "beta", "clip_low",
    "clip_high", "eval_every_steps", "eval_questions", "save_every_steps", "steps",
    "memory.mlp_tile_tokens",
    "lora.rank",
    "log_texts",
)  # fmt: skip


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    least = "at least 0" if name in _MAY_BE_ZERO else "above 0"
    if not (value >= 0 if name in _MAY_BE_ZERO else value > 0) or value == float("inf"):
        reject(f"{name}={value}", f"a finite number {least}", f"Set {name} accordingly.")


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        reject(f"{name}={value!r}", f"one of {', '.join(choices)}", "Check the spelling.")


def reject(came: str, expected: str, todo: str) -> None:
    raise ValueError(f"config: got {came}; expected {expected}. {todo}")


def read_toml(path: str | Path, base: TrainConfig | None = None) -> TrainConfig:
    """`base` with the settings of a TOML file; an unknown key names the nearest known one."""
    config: TrainConfig = with_settings(base or TrainConfig(), load_toml(path), str(path))
    return config


def load_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file; ValueError that names the file."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        reject(f"config={str(path)!r}", "a TOML file that exists", "Check the path.")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        reject(f"{path}, which is no TOML ({error})", "lines like steps = 10", "Mend it.")
    return {}


def with_settings(base: Any, given: dict[str, Any], path: str) -> Any:
    """`base`, a config or a group of one, with the `given` fields; `path` is where they stood."""
    known = {f.name: f for f in dataclasses.fields(base)}
    found = {}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]!r}?" if near else "See `riskpo train --help`."
            reject(f"unknown key {key!r} in {path}", f"a field of {type(base).__name__}", hint)
        inner = getattr(base, key)
        if dataclasses.is_dataclass(inner) and isinstance(value, dict):
            found[key] = with_settings(inner, value, path)
        else:
            found[key] = _typed(key, str(known[key].type), value)
    return dataclasses.replace(base, **found)


def _typed(key: str, annotation: str, value: object) -> object:
    """`value` as the field's type; TOML has no tuples and writes 1 where 1.0 is meant."""
    if annotation.startswith("tuple"):
        if isinstance(value, list) and all(isinstance(x, str) for x in value):
            return tuple(value)
    elif annotation.startswith("float") and type(value) is int:
        return float(value)
    elif type(value).__name__ == annotation.removesuffix(" | None"):
        return value
    reject(f"{key}={value!r}", annotation, "Change its type in the TOML file.")
    return None


def to_toml(config: TrainConfig) -> str:
    """The effective settings as TOML; a None has no line, since TOML has no word for it."""
    return tomli_w.dumps(_without_none(dataclasses.asdict(config)))


def _without_none(given: dict[str, Any]) -> dict[str, Any]:
    return {
        k: _without_none(v) if isinstance(v, dict) else v for k, v in given.items() if v is not None
    }


def changed_fields(saved: dict[str, Any], config: TrainConfig) -> list[str]:
    """`name: saved -> now` for every setting that a resumed run may not change."""
    return [text for name, text in changes(saved, config).items() if locked(name, text)]


def locked(name: str, change: str) -> bool:
    """Whether a change to what is not free is more than other roundings; 8-bit moments are."""
    return name not in CHANGES_BITS or "8bit" in change


def changes(saved: dict[str, Any], config: TrainConfig) -> dict[str, str]:
    """name -> `name: saved -> now` of what differs and is not free.

    A setting that the saved run did not know yet had its default.
    """
    before = flat(TrainConfig()) | _flattened(saved)
    return {
        name: f"{name}: {before[name]!r} -> {value!r}"
        for name, value in flat(config).items()
        if name not in (*FREE_ON_RESUME, "run_dir") and _plain(before[name]) != _plain(value)
    }


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value

"""Every setting of a run, in one place; units are in the names.

Precedence: defaults < TOML file < command line. `resolve` makes a RunConfig of what was given, with
a number for every setting whose default depends on model and data; settings of the algorithm stay
None where the row of riskpo/algorithms.py decides. The types of the fields say what each may be:
tyro reads them on the command line, pydantic checks them.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import tomli_w
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AllowInfNan, TypeAdapter, ValidationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

C = TypeVar("C")
Count = Annotated[int, Gt(0)]
CountOr0 = Annotated[int, Ge(0)]
Number = Annotated[float, Gt(0), AllowInfNan(False)]
NumberOr0 = Annotated[float, Ge(0), AllowInfNan(False)]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class MemoryConfig:
    """Memory for activations, optimiser and head. Every switch trades time for memory."""

    checkpointing: bool = False  # recompute each layer's activations in the backward
    offload_checkpoints: bool = False  # keep the checkpoints in pinned CPU memory
    mlp_tile_tokens: CountOr0 = 0  # tokens of an MLP at a time; 0: all of them
    # where its state is: on the device, on the CPU, or on the device in 8 bits (bitsandbytes)
    optimizer: Literal["device", "host", "8bit"] = "device"
    # of packed sequences, see riskpo/model/attention.py
    attention: Literal["auto", "flash", "varlen", "sequences", "masked"] = "auto"
    skip_zero_advantage: bool = True  # they stay out of the update, unless entropy_coef is set
    head_mib: Count = 300  # workspace of the fused head
    sharded: bool = False  # over several processes, by FSDP2


@dataclass(frozen=True)
class SamplerConfig:
    """The engine that samples, and a correction for its log-probs not being the trainer's."""

    engine: Literal["generate", "vllm"] = "generate"  # generate is that of transformers
    sequences: Count = 512  # responses that are sampled at once
    static_cache: bool = False  # of generate: a fixed size, which CUDA decoding is compiled for
    gpu_share: Number = 0.4  # of GPU memory, for vllm while it is awake
    # Which words may be drawn; the policy that is trained is the one over these alone.
    top_k: CountOr0 = 0  # the likeliest so many; 0: all
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0  # the likeliest that hold this much probability
    min_p: Annotated[float, Ge(0), Lt(1)] = 0.0  # those above this share of the likeliest one's
    correction: Literal["none", "tis", "mis"] = "none"  # tis truncates weights, mis masks them
    level: Literal["token", "sequence"] = "token"  # of the weights
    cap: Number = 2.0  # of trainer / sampler probability


@dataclass(frozen=True)
class LoraConfig:
    """Adapters beside frozen weights (peft); rank 0 trains all weights."""

    rank: CountOr0 = 0
    alpha: Count = 32
    targets: tuple[str, ...] = ("all-linear",)  # names of layers; never the head


@dataclass(frozen=True)
class ColumnsConfig:
    """Names of your data's columns, where their form is not recognised; "a.b": b inside a."""

    question: str | None = None  # text, or a list of messages
    gold: str | None = None  # the reference answer
    id: str | None = None  # None: a hash of the question
    prior: str | None = None  # a number, larger for easier questions, of difficulty="prior"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `riskpo train`; a group is a table in TOML and `--group.name` on the line."""

    run_dir: str = "runs/demo"  # everything a run writes goes here; the same folder resumes
    algorithm: str = "riskpo-paper"  # a row of riskpo/algorithms.py
    model: str | None = None  # folder or hub name of a causal LM; None: the embedded tiny model
    data: str | None = None  # file, hub name, or embedded:mixed, :large, :tiny; None: the demo's
    eval_data: str | None = None  # None: a held-out part of data
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    teacher: str | None = None  # of algorithm="distill": folder, file or hub name of a causal LM
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"  # from the teacher
    reward: str = "auto"  # auto, math, code, exact, your "module:function" or "file.py:function"
    seed: CountOr0 = 0
    steps: CountOr0 = 300

    questions_per_step: Count = 40
    responses_per_question: Count = 8
    updates_per_step: Count = 1  # mini-batches per batch of rollouts; above 1 is off-policy
    micro_batch_tokens: Count | None = None  # packed tokens that go through the model at once

    max_prompt_tokens: Count | None = None
    max_response_tokens: Count | None = None
    temperature: Number = 1.0

    learning_rate: Number | None = None
    warmup_steps: CountOr0 = 20  # of the learning rate, in optimiser steps
    weight_decay: NumberOr0 = 0.01
    max_grad_norm: Number = 1.0
    entropy_coef: NumberOr0 = 0.0

    bundle_size: Count | None = None
    omega: NumberOr0 | None = None
    alpha: NumberOr0 | None = None
    beta: NumberOr0 | None = None
    baseline: str | None = None
    scale: str | None = None
    credit: str | None = None
    difficulty: str | None = None  # of matched bundles: where they know it from, see docs/risk.md
    clip_low: NumberOr0 | None = None
    clip_high: NumberOr0 | None = None

    backend: Literal["auto", "triton", "torch", "reference"] = "auto"  # of the fused loss
    dtype: Dtype = "float32"  # of the weights; bfloat16 with float32 master weights
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    eval_every_steps: CountOr0 = 100
    eval_questions: CountOr0 = 200
    eval_samples: Count = 8  # avg@k with k = this
    save_every_steps: CountOr0 = 100
    log_texts: CountOr0 = 8  # responses of each step that are kept in run_dir/rollouts.jsonl
    log_with: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # besides JSONL
    verifier_seconds: Number = 5.0  # wall clock per answer


@dataclass(frozen=True)
class RunConfig(TrainConfig):
    """What a run works with: a TrainConfig in which these have a number too."""

    micro_batch_tokens: Count = 16384
    max_prompt_tokens: Count = 512
    max_response_tokens: Count = 1024
    learning_rate: Number = 1e-6


# Of the embedded tasks, whose answers have four digits and an end: room to ramble below eight.
DEMO = {
    "learning_rate": 3e-4,
    "micro_batch_tokens": 512,
    "max_prompt_tokens": 16,
    "max_response_tokens": 8,
}
# What the paper's row needs in order to learn within the demo's few minutes (docs/demo.md).
DEMO_OVERRIDES = {"riskpo-paper": {"baseline": "leave-one-out"}}

IN_FLIGHT = 2  # layer inputs at once on their way to the CPU, under memory.offload_checkpoints
# What a resumed run may change: these settings change no number, CHANGES_BITS only roundings.
FREE_ON_RESUME = (
    "steps", "save_every_steps", "log_texts", "log_with", "eval_every_steps", "eval_samples",
    "sampler.gpu_share", "memory.sharded", "memory.checkpointing", "memory.offload_checkpoints",
)  # fmt: skip
CHANGES_BITS = (
    "micro_batch_tokens", "backend", "verifier_seconds", "sampler.sequences",
    "sampler.static_cache", "memory.mlp_tile_tokens", "memory.optimizer", "memory.attention",
    "memory.skip_zero_advantage", "memory.head_mib",
)  # fmt: skip


def resolve(config: TrainConfig) -> tuple[RunConfig, dict[str, Any]]:
    """(settings of the run, those that the demo overrides in the algorithm's row).

    What the user has given wins over both.
    """
    demo = config.model is None and config.data is None
    given = {k: v for k, v in vars(config).items() if v is not None}
    overrides = DEMO_OVERRIDES.get(config.algorithm, {}) if demo else {}
    overrides = {k: v for k, v in overrides.items() if k not in given}
    filled = {**(DEMO if is_embedded(config.data) else {}), **overrides, **given}
    return RunConfig(**filled), overrides


def is_embedded(data: str | None) -> bool:
    """Whether the questions are made here: a name of riskpo.demo.TASKS, or None."""
    return data is None or data.partition(":")[0] == "embedded"


def validate(config: TrainConfig) -> None:
    """ValueError for settings that cannot run: what came, what was expected, what to do."""
    c = check_types(config)
    if c.model is None and not is_embedded(c.data) or c.model is not None and c.data is None:
        missing = "model" if c.model is None else "data"
        other = "both model and data, or neither"
        reject(f"{missing}=None beside the other", other, f"Set {missing}.")
    if c.memory.offload_checkpoints and not c.memory.checkpointing:
        reject(
            "memory.offload_checkpoints without memory.checkpointing",
            "both, since it is the checkpoints that move",
            "Set memory.checkpointing.",
        )
    needs_files = {"sampler.engine='vllm'": c.sampler.engine == "vllm", "lora.rank": c.lora.rank}
    for name, wanted in needs_files.items():
        if wanted and c.model is None:
            reject(f"{name} with the embedded model", "a model on disk or a hub", "Set model.")
    narrowed = c.sampler.top_k or c.sampler.top_p < 1 or c.sampler.min_p
    if narrowed and c.sampler.engine == "vllm":
        reject(
            "sampler.top_k, top_p or min_p with sampler.engine='vllm'",
            "sampler.engine='generate', which keeps the words that each token was drawn from, so "
            "that the policy over these is trained",
            "Change one of them.",
        )
    check_columns(c.columns)
    if (c.difficulty == "prior") != (c.columns.prior is not None):
        reject(
            f"difficulty={c.difficulty!r} with columns.prior={c.columns.prior!r}",
            "difficulty='prior' and the column that holds it, or neither",
            "Name the column that says how easy a question is.",
        )
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


def reject(came: str, expected: str, todo: str) -> NoReturn:
    raise ValueError(f"config: got {came}; expected {expected}. {todo}")


def read_toml(path: str | Path, base: TrainConfig | None = None) -> TrainConfig:
    """`base` with the settings of a TOML file; an unknown key names the nearest known one."""
    return with_settings(base or TrainConfig(), load_toml(path), str(path))


def load_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file; ValueError that names the file."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        reject(f"config={str(path)!r}", "a TOML file that exists", "Check the path.")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        reject(f"{path}, which is no TOML ({error})", "lines like steps = 10", "Mend it.")


def with_settings(base: C, given: dict[str, Any], path: str) -> C:
    """The config `base` with the `given` settings, checked; errors name `path` as their source."""
    return _checked(type(base), _merged(base, given, path), path)


def check_types(config: C) -> C:
    """The config; ValueError names a setting that is not what its field may be."""
    return _checked(type(config), dataclasses.asdict(config), "your settings")  # type: ignore[call-overload]


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """The hint beside a name that is not known."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"Did you mean {near[0]!r}?" if near else otherwise


def _merged(base: Any, given: dict[str, Any], path: str) -> dict[str, Any]:
    """The settings of `base` with the given ones; an unknown name is told the nearest one."""
    found = dataclasses.asdict(base)
    for key, value in given.items():
        if key not in found:
            hint = nearest(key, found, "See `riskpo train --help`.")
            reject(f"unknown key {key!r} in {path}", f"a field of {type(base).__name__}", hint)
        group = isinstance(found[key], dict) and isinstance(value, dict)
        found[key] = _merged(getattr(base, key), value, path) if group else value
    return found


def _checked(kind: type[C], given: dict[str, Any], path: str) -> C:
    """By way of JSON: from it pydantic takes a list for a tuple and 1 for 1.0, as TOML writes."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
    name = ".".join(part for part in first["loc"] if isinstance(part, str))
    expected = first["msg"].removeprefix("Input should be ")
    reject(f"{name}={first['input']!r}", expected, f"Change it in {path}.")


def to_toml(config: TrainConfig) -> str:
    """The effective settings as TOML; a None has no line, since TOML has no word for it."""
    return tomli_w.dumps(_without_none(dataclasses.asdict(config)))


def _without_none(given: dict[str, Any]) -> dict[str, Any]:
    return {
        k: _without_none(v) if isinstance(v, dict) else v for k, v in given.items() if v is not None
    }


def locked(name: str, change: str) -> bool:
    """Whether a resumed run refuses this change: all but roundings, which 8-bit moments are not."""
    return name not in CHANGES_BITS or "8bit" in change


def changes(saved: dict[str, Any], config: TrainConfig) -> dict[str, str]:
    """{name: "name: saved -> now"} of every setting that differs and may not change freely.

    A setting that did not exist when the run was saved counts as its default.
    """
    before = flat(TrainConfig()) | _flattened(saved)
    return {
        name: f"{name}: {before[name]!r} -> {value!r}"
        for name, value in flat(config).items()
        if name not in (*FREE_ON_RESUME, "run_dir") and _plain(before[name]) != _plain(value)
    }


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value

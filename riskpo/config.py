"""Every setting of a run, in one place; units are in the names.

Precedence: defaults < TOML file < command line. `resolve` turns what the user gave into a RunConfig
and fills in each default that depends on model and data. A setting of the algorithm stays None
where the row of riskpo/algorithms.py decides. The field types say which values are allowed: tyro
parses them from the command line, pydantic checks them. The comments are the text of --help.
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
Share = Annotated[float, Gt(0), Le(1)]
NumberOr0 = Annotated[float, Ge(0), AllowInfNan(False)]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class MemoryConfig:
    """Memory for activations, optimiser and head. Every switch trades time for memory."""

    checkpointing: bool = False  # recompute each layer's activations in the backward
    offload_checkpoints: bool = False  # keep the checkpoints in pinned CPU memory
    mlp_tile_tokens: CountOr0 = 0  # tokens that go through an MLP at once; 0: all of them
    # where the AdamW state is: on the device, in CPU memory, or 8-bit on the device (bitsandbytes)
    optimizer: Literal["device", "host", "8bit"] = "device"
    # kernel for packed sequences; auto: the fastest that the model and the machine allow
    attention: Literal["auto", "flash", "varlen", "sequences", "masked"] = "auto"
    skip_zero_advantage: bool = True  # leave advantage 0 out where no term needs it
    head_mib: Count = 300  # workspace of the fused head, in MiB
    sharded: bool = False  # shard weights and optimiser state over the processes (FSDP2)


@dataclass(frozen=True)
class SamplerConfig:
    """The engine that samples responses, and importance weights that correct its log-probs."""

    engine: Literal["generate", "vllm"] = "generate"  # generate: transformers' own
    sequences: Count = 512  # responses sampled at once
    static_cache: bool = False  # generate only: a fixed-size cache, so that CUDA decoding compiles
    gpu_share: Share = 0.4  # vllm only: share of GPU memory while it is awake, above 0, at most 1
    top_k: CountOr0 = 0  # sample from the k likeliest tokens; 0: all. Training uses the same set
    top_p: Share = 1.0  # the likeliest tokens that reach this probability
    min_p: Annotated[float, Ge(0), Lt(1)] = 0.0  # tokens with this share of the likeliest's or more
    correction: Literal["none", "tis", "mis"] = "none"  # tis truncates weights, mis masks them
    level: Literal["token", "sequence"] = "token"  # one weight per token or per response
    cap: Number = 2.0  # largest weight; it is the ratio trainer / sampler of probabilities


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters on frozen weights, through peft."""

    rank: CountOr0 = 0  # 0: no adapters, all weights are trained
    alpha: Count = 32  # the adapter's output is scaled by alpha / rank
    targets: tuple[str, ...] = ("all-linear",)  # names of the layers to adapt; never the head


@dataclass(frozen=True)
class ColumnsConfig:
    """Column names of data whose form is not recognised; "a.b" is the field b inside column a."""

    question: str | None = None  # text, or a list of messages
    gold: str | None = None  # the reference answer
    id: str | None = None  # None: a hash of the question
    prior: str | None = None  # with difficulty="prior": a number, larger for easier questions


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `riskpo train`. A group is a table in TOML and `--group.name` as an option."""

    run_dir: str = "runs/demo"  # folder for everything a run writes; the same folder resumes it
    algorithm: str = "riskpo-paper"  # riskpo-loo, grpo, dapo, ...: a row of riskpo/algorithms.py
    model: str | None = None  # folder, GGUF file or hub name; None: the embedded tiny model
    data: str | None = None  # file, hub name, or embedded:mixed, :large, :tiny; None: the demo's
    eval_data: str | None = None  # held-out questions; None: a part of data
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    teacher: str | None = None  # with algorithm="distill": folder, GGUF file or hub name
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"  # loss of "distill"
    reward: str = "auto"  # auto, math, code, exact, your "module:function" or "file.py:function"
    seed: CountOr0 = 0  # of every random number of the run
    steps: CountOr0 = 300  # batches of rollouts, in all

    questions_per_step: Count = 40  # a multiple of updates_per_step and of the bundle size
    responses_per_question: Count = 8  # the group that an advantage compares
    updates_per_step: Count = 1  # optimiser steps per batch of rollouts; above 1 is off-policy
    micro_batch_tokens: Count | None = None  # packed tokens per forward; None: 16384, embedded 512

    max_prompt_tokens: Count | None = None  # longer prompts are left out; None: 512, embedded 16
    max_response_tokens: Count | None = None  # longer responses are cut; None: 1024, embedded 8
    temperature: Number = 1.0  # of sampling, and of the policy that is trained

    learning_rate: Number | None = None  # of AdamW; None: 1e-6, embedded 3e-4
    warmup_steps: CountOr0 = 20  # optimiser steps over which the learning rate rises linearly
    weight_decay: NumberOr0 = 0.01  # of AdamW
    max_grad_norm: Number = 1.0  # longer gradients are scaled down to this norm
    entropy_coef: NumberOr0 = 0.0  # weight of the entropy bonus in the loss

    bundle_size: Count | None = None  # questions per bundle; None here and below: the algorithm's
    omega: NumberOr0 | None = None  # weight of the lower tail
    alpha: NumberOr0 | None = None  # level of the lower quantile, 0 to 1
    beta: NumberOr0 | None = None  # level of the upper quantile, 0 to 1
    baseline: str | None = None  # natural, none, leave-one-out, batch
    scale: str | None = None  # divisor of the advantage: none, bundle-std, batch-std
    credit: str | None = None  # within a bundle: uniform, score, std, sum-mean, conditional
    difficulty: str | None = None  # what matched bundles go by: history, prior, cross-fit
    clip_low: NumberOr0 | None = None  # lower bound of the ratio, as a distance from 1
    clip_high: NumberOr0 | None = None  # upper bound of the ratio, as a distance from 1

    backend: Literal["auto", "triton", "torch", "reference"] = "auto"  # of the fused loss
    dtype: Dtype = "float32"  # of the weights; with bfloat16 AdamW steps float32 copies
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    eval_every_steps: CountOr0 = 100  # 0: only before the first step
    eval_questions: CountOr0 = 200  # held-out questions; 0: no evaluation
    eval_samples: Count = 8  # responses to each of them: the n of avg@n
    save_every_steps: CountOr0 = 100  # 0: no checkpoints
    log_texts: CountOr0 = 8  # responses per step that are kept in run_dir/rollouts.jsonl
    log_with: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # besides metrics.jsonl
    verifier_seconds: Number = 5.0  # time limit per answer, wall clock


@dataclass(frozen=True)
class RunConfig(TrainConfig):
    """A TrainConfig whose sizes and learning rate are numbers, as `resolve` makes it."""

    micro_batch_tokens: Count = 16384
    max_prompt_tokens: Count = 512
    max_response_tokens: Count = 1024
    learning_rate: Number = 1e-6


# For the embedded tasks. Answers are at most four digits and an end token; 8 leaves some room.
DEMO = {
    "learning_rate": 3e-4,
    "micro_batch_tokens": 512,
    "max_prompt_tokens": 16,
    "max_response_tokens": 8,
}
# What the paper's row needs in order to learn within the demo's few minutes (docs/demo.md).
DEMO_OVERRIDES = {"riskpo-paper": {"baseline": "leave-one-out"}}

IN_FLIGHT = 2  # layer inputs on their way to the CPU at once, with memory.offload_checkpoints
# A resumed run may change these. FREE_ON_RESUME changes no number, CHANGES_BITS only roundings.
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
    """(the run's settings, the ones among them that the demo overrides in the algorithm's row).

    What the user gave wins over every default.
    """
    demo = config.model is None and config.data is None
    given = {k: v for k, v in vars(config).items() if v is not None}
    overrides = DEMO_OVERRIDES.get(config.algorithm, {}) if demo else {}
    overrides = {k: v for k, v in overrides.items() if k not in given}
    filled = {**(DEMO if is_embedded(config.data) else {}), **overrides, **given}
    return RunConfig(**filled), overrides


def is_embedded(data: str | None) -> bool:
    """Whether the questions are generated: `data` names one of riskpo.demo.TASKS, or is None."""
    return data is None or data.partition(":")[0] == "embedded"


def validate(config: TrainConfig) -> None:
    """ValueError for settings that cannot run together or are out of range."""
    c = check_types(config)
    if c.model is None and not is_embedded(c.data) or c.model is not None and c.data is None:
        missing = "model" if c.model is None else "data"
        other = "both model and data, or neither"
        given = f"data={c.data!r}" if c.model is None else f"model={c.model!r}"
        reject(f"{missing}=None with {given}", other, f"Set {missing}, or unset the other.")
    if c.memory.offload_checkpoints and not c.memory.checkpointing:
        reject(
            "memory.offload_checkpoints without memory.checkpointing",
            "both, since the checkpoints are what is offloaded",
            "Set memory.checkpointing.",
        )
    needs_files = {"sampler.engine='vllm'": c.sampler.engine == "vllm", "lora.rank": c.lora.rank}
    for name, wanted in needs_files.items():
        if wanted and c.model is None:
            reject(f"{name} with the embedded model", "a model folder or hub name", "Set model.")
    narrowed = c.sampler.top_k or c.sampler.top_p < 1 or c.sampler.min_p
    if narrowed and c.sampler.engine == "vllm":
        reject(
            "sampler.top_k, top_p or min_p with sampler.engine='vllm'",
            "sampler.engine='generate', which records the tokens that could be drawn; training "
            "needs them",
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
    """ValueError unless question and gold are both set or both unset."""
    if (columns.question is None) != (columns.gold is None) or columns.id and not columns.gold:
        reject(
            f"columns.question={columns.question!r} with columns.gold={columns.gold!r}",
            "both, or neither",
            "Name the column of the question and that of its answer.",
        )


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
        reject(f"{path}, which is not TOML ({error})", "lines like steps = 10", "Mend it.")


def with_settings(base: C, given: dict[str, Any], path: str) -> C:
    """The config `base` with the `given` settings, checked; errors name `path` as their source."""
    return _checked(type(base), _merged(base, given, path), path)


def check_types(config: C) -> C:
    """The config, its values checked against the field types; ValueError names the setting."""
    return _checked(type(config), dataclasses.asdict(config), "your settings")  # type: ignore[call-overload]


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """A hint for an unknown name: the most similar known one, else `otherwise`."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"Did you mean {near[0]!r}?" if near else otherwise


def _merged(base: Any, given: dict[str, Any], path: str) -> dict[str, Any]:
    """The settings of `base` with the given ones; ValueError suggests a name for an unknown one."""
    found = dataclasses.asdict(base)
    for key, value in given.items():
        if key not in found:
            hint = nearest(key, found, "See `riskpo train --help`.")
            reject(f"unknown key {key!r} in {path}", f"a field of {type(base).__name__}", hint)
        group = isinstance(found[key], dict) and isinstance(value, dict)
        found[key] = _merged(getattr(base, key), value, path) if group else value
    return found


def _checked(kind: type[C], given: dict[str, Any], path: str) -> C:
    """Goes through JSON: there pydantic accepts a list for a tuple and 1 for 1.0, as TOML has."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(given), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
    name = ".".join(part for part in first["loc"] if isinstance(part, str))
    expected = first["msg"].removeprefix("Input should be ")
    reject(f"{name}={first['input']!r}", expected, f"Change it in {path}.")


def to_toml(config: TrainConfig) -> str:
    """The effective settings as TOML; a None is left out, since TOML has no null."""
    return tomli_w.dumps(TypeAdapter(type(config)).dump_python(config, exclude_none=True))


def locked(name: str, change: str) -> bool:
    """Whether a resumed run refuses this change: 8-bit moments, and all but roundings."""
    return name not in CHANGES_BITS or "8bit" in change


def changes(saved: dict[str, Any], config: TrainConfig) -> dict[str, str]:
    """{name: "name: saved -> now"} for each changed setting that is not in FREE_ON_RESUME.

    A setting that is missing in `saved` counts as its default.
    """
    before, now = (_flat(dataclasses.asdict(x)) for x in (TrainConfig(), config))
    before |= _flat(saved)
    return {
        name: f"{name}: {before[name]!r} -> {value!r}"
        for name, value in now.items()
        if name not in (*FREE_ON_RESUME, "run_dir") and before[name] != value
    }


def _flat(given: dict[str, Any]) -> dict[str, Any]:
    """By full name, `memory.checkpointing` for a setting of a group; tuples as lists."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        inner = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else None
        found |= inner or {name: value}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

"""`riskpo plan`: the memory of a training step, what each switch saves, what fits on which GPU.

The plan needs the model's config alone and loads no weight. riskpo/memory_plan/budget.py derives
the terms; docs/long-context.md and docs/plan.md say how far they are off.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import tyro
from rich.console import Console
from rich.table import Table

from riskpo.config import Count, Dtype, MemoryConfig, Number, check_types
from riskpo.errors import loading, refusals_in_one_line
from riskpo.memory_plan.budget import (
    ENOUGH,
    GIB,
    MOMENTS,
    Budget,
    Workload,
    attention_flop,
    budget,
    gib,
    longest,
)
from riskpo.memory_plan.model_shape import ModelShape, check_name, find_shape

# name -> (GB of memory, bf16 TFLOP/s of flash attention, forward and backward). The speed is about
# half of the card's peak: an order of magnitude.
GPUS = {
    "4090": (24, 80),
    "3090": (24, 35),
    "L4": (24, 50),
    "A100": (80, 150),
    "H100": (80, 400),
    "H200": (141, 400),
}
BY_SIZE = {24: 80, 80: 400, 141: 400}  # TFLOP/s where only the memory is given
USABLE = 0.98  # of the nominal size, read as GiB, that the driver leaves
RESERVE_GIB = 1.5  # CUDA context, cuBLAS workspaces, fragmentation: an assumption
TILE = 4096

WIDTH = 116  # columns of what is printed

PLAIN = MemoryConfig()
CHECKPOINTS = replace(PLAIN, checkpointing=True)
ON_HOST = replace(CHECKPOINTS, offload_checkpoints=True)
TILED = replace(ON_HOST, mlp_tile_tokens=TILE)
# The columns of the table: (label, switches, whether the head keeps [T, V] logits). Each adds one
# switch; the last two are alternatives.
LADDER = (
    ("mask", replace(PLAIN, attention="masked"), True),
    ("no mask", PLAIN, True),
    ("+ ckpt", CHECKPOINTS, True),
    ("+ fused", CHECKPOINTS, False),
    ("+ offload", ON_HOST, False),
    ("+ tiles", TILED, False),
    ("+ 8-bit", replace(TILED, optimizer="8bit"), False),
    ("or host", replace(TILED, optimizer="host"), False),
)
LEGEND = (
    "mask: no switch at all, and transformers' own [T, T] mask, which a packed row of several "
    "sequences needs. no mask: memory.attention='auto'. ckpt: memory.checkpointing. fused: the "
    "head without [T, V] logits, as riskpo always has it. offload: memory.offload_checkpoints. "
    f"tiles: memory.mlp_tile_tokens={TILE}. 8-bit, host: memory.optimizer.\n"
    "Terms of the update that overlap in time add up. The head and the layers take turns, and in a "
    "layer the backward of its MLP and of its attention: only the largest turn counts in the peak, "
    "and the others are in brackets."
)


@dataclass(frozen=True)
class PlanConfig:
    """Settings of `riskpo plan`, which predicts the memory of a training step, term by term."""

    # folder with a config.json, GGUF file, name in the hub cache, or Qwen2.5-1.5B, Qwen2.5-7B,
    # Llama-3.1-8B
    model: str
    context: Count = 32768  # tokens per sequence, prompt included; a micro-batch has as many
    gpu: tuple[str, ...] = ("24", "80", "141")  # GB, or a name: 4090, 3090, L4, A100, H100, H200
    dtype: Dtype = "bfloat16"  # of the weights
    sequences: Count = 8  # responses sampled at once
    prompt: Count = 512  # tokens per prompt; all prompts are read at once
    head_mib: Count = 300  # workspace of the fused head, in MiB
    tflops: Number | None = None  # attention speed of the GPU in TFLOP/s; None: a rough figure


@dataclass(frozen=True)
class Card:
    """A GPU by what the plan needs of it."""

    name: str
    bytes: float
    tflops: float


def find_card(text: str) -> Card:
    """A size in GB or a name of GPUS; ValueError lists them."""
    name, size = text.upper(), text.upper().removesuffix("GB")
    if name in GPUS:
        gb, tflops = GPUS[name]
    elif size.isdigit() and int(size) > 0:
        name, gb, tflops = f"{size} GB", int(size), BY_SIZE.get(int(size), 100)
    else:
        raise ValueError(
            f"plan: got --gpu {text!r}; expected a size in GB or one of {', '.join(GPUS)}. Give "
            "its size."
        )
    return Card(name, (gb * USABLE - RESERVE_GIB) * GIB, tflops)


def plan_command(given: list[str]) -> None:
    """Print the plan of the command line."""
    with refusals_in_one_line("riskpo plan"):
        config = tyro.cli(PlanConfig, prog="riskpo plan", args=given)
    check_types(config)
    cards = [find_card(text) for text in config.gpu]
    check_name(config.model)
    loading("plan")
    show(config, cards, find_shape(config.model), Console(width=WIDTH, highlight=False))


def show(config: PlanConfig, cards: list[Card], shape: ModelShape, console: Console) -> None:
    """The two tables and the notes."""
    bytes_each = 2 if config.dtype == "bfloat16" else 4
    work = Workload(config.context, bytes_each, config.sequences, prompt=config.prompt)
    settings = [
        (label, replace(memory, head_mib=config.head_mib), replace(work, plain_head=plain))
        for label, memory, plain in LADDER
    ]
    console.print(
        f"{shape.name}: {shape.parameters / 1e9:.2f}e9 parameters, all trained, {config.dtype}; "
        f"{config.context:,} tokens in a micro-batch; {config.sequences} sequences of that length "
        f"sampled at once, {min(config.prompt, config.context):,} of it the prompt"
    )
    console.print(_terms([(label, budget(shape, m, w)) for label, m, w in settings]))
    console.print(LEGEND + "\n")
    console.print(_reach(config, shape, settings, cards))
    tflop = attention_flop(shape, CHECKPOINTS, config.context) / 1e12
    for card in cards:
        tflops = config.tflops or card.tflops
        seconds = tflop / tflops
        time = f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
        console.print(
            f"attention of one sequence on {card.name}, forward twice and backward: "
            f"{tflop:,.0f} TFLOP, about {time} at {tflops:.0f} TFLOP/s"
        )
    console.print(
        f"A card counts {USABLE:.0%} of its size less {RESERVE_GIB} GiB (context, workspaces, "
        "fragmentation). How far the plan is off: docs/long-context.md, docs/plan.md. The plan "
        "does not check the model's own limit on positions."
    )


def _reach(
    config: PlanConfig,
    shape: ModelShape,
    settings: list[tuple[str, MemoryConfig, Workload]],
    cards: list[Card],
) -> Table:
    """The longest contexts: a row for each setting, a column for each card and kind of sampling."""
    columns = [(card, n) for card in cards for n in dict.fromkeys((config.sequences, 1))]
    table = _table("longest context, tokens", [f"{card.name}, {n} sampled" for card, n in columns])
    for label, memory, work in settings:
        works = [(replace(work, sequences=n), card) for card, n in columns]
        found = [longest(shape, memory, w, card.bytes) for w, card in works]
        table.add_row(label, *("-" if not n else "any" if n >= ENOUGH else f"{n:,}" for n in found))
    return table


def _terms(columns: list[tuple[str, Budget]]) -> Table:
    table = _table("GiB at the peak", [label for label, _ in columns])
    for part in ("fixed", *MOMENTS):
        asides = [b.other if part == "update" else {} for _, b in columns]
        terms = [getattr(b, part) for _, b in columns]
        for name in dict.fromkeys(n for given in (*terms, *asides) for n in given):
            cells = [
                f"({gib(aside[name])})" if name in aside else gib(given.get(name, 0.0))
                for given, aside in zip(terms, asides, strict=True)
            ]
            if any(cell != "-" for cell in cells):
                table.add_row(f"{part}: {name}", *cells)
        table.add_section()
    for moment, doing in MOMENTS.items():
        table.add_row(
            f"all while {doing}",
            *(gib(sum(b.fixed.values()) + b.moments[moment]) for _, b in columns),
        )
    table.add_row("peak", *(gib(b.peak) for _, b in columns))
    table.add_row("memory of the host", *(gib(sum(b.host.values())) for _, b in columns))
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(pad_edge=False, show_edge=False)
    table.add_column(title, no_wrap=True)
    for label in columns:
        table.add_column(label, justify="right")
    return table

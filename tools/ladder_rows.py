"""The rows of the memory ladder: a small model on the CPU, 1.5 billion weights on a GPU.

A row differs from the one it stands `over` in one switch: what it needs less is what the switch
buys. tools/memory_ladder.py measures them, tools/ladder_page.py writes them down.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from riskpo.memory_plan.budget import GIB, MIB
from riskpo.memory_plan.model_shape import KNOWN

EVERY, RESPONSE, FUSED = "every", "response", "fused"


@dataclass(frozen=True)
class Row:
    """One line of the ladder."""

    label: str
    over: str | None = None  # label of the row without its switch; None: the first
    memory: dict[str, Any] = field(default_factory=dict)  # fields of MemoryConfig
    head: str = FUSED  # or [tokens, vocab] logits, of EVERY token or of the RESPONSE's alone
    dtype: str = "float32"  # of the weights
    sequences: int = 1  # of the large micro-batch, equally long


@dataclass(frozen=True)
class Ladder:
    """Rows on one model and device. `unit` is what its tables count in."""

    name: str  # of the files: memory-ladder-{name}.json
    device: str
    model: (
        str | dict[str, Any]
    )  # a name of riskpo.memory_plan.model_shape.KNOWN, or a config's values
    rows: tuple[Row, ...]
    contexts: tuple[int, ...]  # tokens of the large micro-batch
    head_mib: int
    unit: tuple[str, int]
    folder: str | None = None  # of a pretrained model; None: random weights

    @property
    def config(self) -> dict[str, Any]:
        return dict(KNOWN[self.model] if isinstance(self.model, str) else self.model)

    def row(self, label: str) -> Row:
        """The row of that label; KeyError lists the others."""
        found = {row.label: row for row in self.rows}
        if label not in found:
            raise KeyError(f"memory ladder: got row {label!r}; expected one of {list(found)}")
        return found[label]


CKPT: dict[str, Any] = {"checkpointing": True}
MASKED: dict[str, Any] = {"attention": "masked"}
MASK = "[T, T] mask, logits of every token"
SPLIT = "+ attention by sequence"
BARE = "logits of every token"
KEPT = "+ checkpointing"
HALF = "+ logits of the response alone"
HEAD = "+ fused head"
PARKED = "+ checkpoints in a second place"

TILED: dict[str, Any] = {**CKPT, "mlp_tile_tokens": 512}
TILES = "fused head, MLP in tiles of 512"
SIXTEEN = "bfloat16: fused head, tiles of 512"
PACKED = 4  # sequences of a micro-batch; a single one would need no mask
CPU = Ladder(
    "cpu",
    "cpu",
    {
        "model_type": "qwen2",
        "num_hidden_layers": 8,
        "hidden_size": 384,
        "intermediate_size": 2048,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 36864,
        "tie_word_embeddings": False,
    },
    (
        Row(MASK, None, MASKED, EVERY, sequences=PACKED),
        Row(SPLIT, MASK, {}, EVERY, sequences=PACKED),
        Row(KEPT, SPLIT, CKPT, EVERY, sequences=PACKED),
        Row(HALF, KEPT, CKPT, RESPONSE, sequences=PACKED),
        Row(HEAD, HALF, CKPT, sequences=PACKED),
        Row(PARKED, HEAD, {**CKPT, "offload_checkpoints": True}, sequences=PACKED),
        Row(TILES, HEAD, TILED, sequences=PACKED),
        Row("tiles, 8-bit moments", TILES, {**TILED, "optimizer": "8bit"}, sequences=PACKED),
        # float32 weights on a CPU are their own masters: with them "host" would be the same row
        Row(SIXTEEN, None, TILED, dtype="bfloat16", sequences=PACKED),
        Row(
            "bfloat16, optimiser on the host",
            SIXTEEN,
            {**TILED, "optimizer": "host"},
            dtype="bfloat16",
            sequences=PACKED,
        ),
    ),
    (2048, 4096, 8192),
    32,
    ("MiB", MIB),
)

ON_HOST: dict[str, Any] = {**CKPT, "offload_checkpoints": True}
ON_HOST_TILED: dict[str, Any] = {**ON_HOST, "mlp_tile_tokens": 4096}
AWAY = "+ checkpoints on the host"
AWAY_TILED = "+ MLP in tiles of 4,096"
MANY = "fused head, 16 sequences"
GPU = Ladder(
    "gpu",
    "cuda",
    "Qwen2.5-1.5B",
    tuple(
        replace(row, dtype="bfloat16")
        for row in (
            Row(BARE, None, {}, EVERY),
            Row(KEPT, BARE, CKPT, EVERY),
            Row(HALF, KEPT, CKPT, RESPONSE),
            Row(HEAD, HALF, CKPT),
            Row(AWAY, HEAD, ON_HOST),
            Row(AWAY_TILED, AWAY, ON_HOST_TILED),
            Row("tiles, 8-bit moments", AWAY_TILED, {**ON_HOST_TILED, "optimizer": "8bit"}),
            Row("tiles, optimiser on the host", AWAY_TILED, {**ON_HOST_TILED, "optimizer": "host"}),
            # the rows above are one sequence of the whole context, which needs no mask
            Row(MANY, HEAD, CKPT, sequences=16),
            Row("16 sequences, [T, T] mask", MANY, {**CKPT, **MASKED}, sequences=16),
        )
    ),
    (2**15, 2**16, 2**17),
    300,
    ("GiB", GIB),
)


def rehearsal() -> Ladder:
    """The GPU's rows on the CPU, with a model and contexts so small that it takes seconds."""
    small = {**CPU.config, "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 192}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    rows = tuple(replace(row, memory={**row.memory, **_small_tiles(row)}) for row in GPU.rows)
    return replace(
        GPU,
        name="dry",
        device="cpu",
        model=small,
        rows=rows,
        contexts=(256, 512),
        head_mib=8,
        unit=CPU.unit,
    )


def pretrained(folder: str) -> Ladder:
    """The CPU's rows on the model of a Hugging Face folder, at contexts that a CPU ends."""
    values = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    name = f"cpu-{Path(folder).resolve().name}"
    return replace(CPU, name=name, model=values, contexts=(512, 1024, 2048), folder=folder)


def _small_tiles(row: Row) -> dict[str, int]:
    return {"mlp_tile_tokens": 64} if "mlp_tile_tokens" in row.memory else {}


DRY = rehearsal()
LADDERS = {ladder.name: ladder for ladder in (CPU, GPU, DRY)}

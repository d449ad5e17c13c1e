"""The page docs/model-families.md: every family that transformers names, tried tiny.

python -m tools.family_page            # writes the page, about a minute
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from riskpo.model.isolation import Packing, adopt_packing, settle_attention
from riskpo_kernels.causal_lm import Head, add_fused_lm_head, find_head
from tests.model_families import NOT_TINY, build, class_name, families, has_lengths

PAGE = Path(__file__).resolve().parents[1] / "docs" / "model-families.md"
INTRO = """# Which models train

Every causal language model that transformers 5.23.0 names, built tiny and tried on the CPU.
Written by `python -m tools.family_page`; `tests/model/test_model_families.py` tries each again, and
with another release asks only that each is right, row by row or refused by name.

Sequences of a micro-batch:

* **packed**: several go through the model end to end. Values and gradients are those of one
  sequence at a time.
* **one by one**: a state, a mask or a position would carry over, so the trainer calls the model
  once for each sequence, and says so once. The numbers are the same; it is slower.
* **refused**: an error that names the model, before the first step.

The head:

* **right**: log-probs and entropies of `add_fused_lm_head(model)`, padded rows among them, are
  those of the model's own logits.
* **refused**: an error that gives the reason, before the first step.

The loss that the same call gives for `labels`:

* **same**: it is the loss of the model's own forward, without its logits.
* **other**: the model's own is another one, since it does not shift the labels (BART's kin, XLM,
  XLNet), or does not take them so. The call's is that of the next token.

The trainer tries the real model at every start, so a model that is not listed is treated by what
it does. On a GPU with flash-linear-attention, causal-conv1d or mamba-ssm installed, it first tries
the packed path of the model's own kernels, on sequences longer than their chunks. It takes that
path only if hidden states are those of one sequence at a time and no gradient crosses. No release
of these kernels has been run for this page.

Image-text models on rows of text alone (`tests/model/test_image_text_families.py`, transformers
5.23.0): of 97 types 40 are right packed and 20 one by one, 6 of them with a head that is refused.
19 are refused, most since a tiny one does not run on a plain row; 18 could not be built tiny.

| model type | class | sequences | head | loss | why |
|---|---|---|---|---|---|
"""


def settled(family: str) -> tuple[Any, Packing]:
    """(the tiny model, how it is fed), by the steps of a run; its lengths are short, the decision
    is of default ones.

    ValueError where the trainer refuses it.
    """
    model = build(family, tiny_lengths=False)
    packing = settle_attention(model, "auto")
    if has_lengths(family):
        model = build(family)
    adopt_packing(model, "auto", packing)
    return model, packing


def verdicts(family: str) -> tuple[str, str, str, str]:
    """(packed | one by one | refused, right | refused: why, loss_verdict, why) of a family."""
    if family in NOT_TINY:
        return "refused", "-", "-", NOT_TINY[family]
    try:
        model, packing = settled(family)
        fed, why = ("packed", "") if packing.reason is None else ("one by one", packing.reason)
    except ValueError as error:
        model, fed = build(family), "refused"
        why = str(error).partition(": ")[2].split("; ")[0]
    return fed, head_verdict(model), loss_verdict(model), why


def head_verdict(model: Any) -> str:
    try:
        find_head(model)
    except ValueError as error:
        reason = str(error).partition("; expected")[0].removeprefix("head: ")
        return "refused: " + reason.rpartition(f"{type(model).__name__} whose ")[2]
    return "right"


@torch.no_grad()
def loss_verdict(model: Any, head: Head | None = None) -> str:
    """Whether the loss of the fused call is the model's own: same | other | - (no such call)."""
    given = {"input_ids": torch.arange(2, 14)[None], "labels": torch.arange(2, 14)[None]}
    try:
        with add_fused_lm_head(model, head=head):
            ours = model(**given, use_cache=False, fused_lm_head=True).loss
    except ValueError:
        return "-"
    try:
        own = model(**given, use_cache=False).loss
    except ValueError:
        return "other"
    return "same" if abs(float(ours - own)) < 1e-4 * float(ours) else "other"


def rows() -> dict[str, list[str]]:
    """The page's table as it is now: the cells of each model type."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return {row[0].strip("`"): row for row in cells[2:]}


def write() -> None:
    lines = []
    for family in families():
        cells = (f"`{family}`", class_name(family), *verdicts(family))
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |\n")
        print(lines[-1], end="", file=sys.stderr)
    intro = INTRO.replace("5.23.0", transformers.__version__)
    PAGE.write_text(intro + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write()

"""The page docs/model-families.md: every family that transformers names, tried tiny.

python -m tools.family_page            # writes the page, about a minute
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from riskpo.model.isolation import Packing, settle_attention
from riskpo.model.lm_head import find_head
from tests.model_families import NOT_TINY, build, class_name, families

PAGE = Path(__file__).resolve().parents[1] / "docs" / "model-families.md"
INTRO = """# Which models train

Every causal language model that transformers names, built tiny and tried on the CPU without
optional kernels. Written by `python -m tools.family_page`; `tests/model/test_model_families.py`
tries each again.

* **packed**: several sequences go through the model end to end. Values and gradients are those of
  one sequence at a time.
* **one by one**: a state, a mask or a position would carry over, so the trainer calls the model
  once for each sequence, and says so once. The numbers are the same; it is slower.
* **refused**: an error that names the model, before the first step.

The trial runs on the real model at every start, so a model that is not listed is treated by what
it does. With flash-linear-attention, causal-conv1d or mamba-ssm installed, the model's own packed
path is tried first: some of the second kind may then be packed. The head is what
`riskpo.model.lm_head.find_head` says of the same tiny model.

| model type | class | sequences | head | why |
|---|---|---|---|---|
"""


def settled(family: str, **changes: Any) -> tuple[Any, Packing]:
    """(the tiny model, how it is fed); its lengths are short, the decision is of default ones.

    ValueError where the trainer refuses it.
    """
    packing = settle_attention(build(family, tiny_lengths=False, **changes), "auto")
    model = build(family, **changes)
    settle_attention(model, "auto")
    return model, packing


def verdict(family: str) -> tuple[str, str]:
    """(packed | one by one | refused, why) of a family."""
    if family in NOT_TINY:
        return "refused", NOT_TINY[family]
    try:
        _, packing = settled(family)
    except ValueError as error:
        return "refused", str(error).partition("; ")[0].partition(": ")[2]
    return ("packed", "") if packing.reason is None else ("one by one", packing.reason)


def head_verdict(family: str) -> str:
    if family in NOT_TINY:
        return "-"
    try:
        find_head(build(family))
    except Exception:  # as the family's own code fails without pictures or masks
        return "refused"
    return "right"


def rows() -> dict[str, list[str]]:
    """The page's table as it is now: the cells of each model type."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return {row[0].strip("`"): row for row in cells[2:]}


def write() -> None:
    lines = []
    for family in families():
        what, why = verdict(family)
        why = why.replace("|", "/")
        lines.append(
            f"| `{family}` | {class_name(family)} | {what} | {head_verdict(family)} | {why} |\n"
        )
        print(lines[-1], end="", file=sys.stderr)
    PAGE.write_text(INTRO + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write()

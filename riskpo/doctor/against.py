"""The same batch through a library's own path and through ours, beside float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from riskpo.doctor.libraries import LIBRARIES
from riskpo.doctor.problem import Problem, Results, Yardstick, make_problem, ours, plain
from riskpo.doctor.tolerance import errors, within

QUANTITIES = ("logprob", "entropy", "loss", "dhidden", "dweight")  # that libraries give
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """One quantity in one dtype; all numbers are largest absolute differences."""

    dtype: str
    quantity: str
    difference: float  # theirs - ours
    theirs: float  # theirs - float64
    ours: float  # ours - float64
    plain: float  # plain PyTorch in this dtype - float64; of the loss: summed over its terms
    size: float = 1.0  # the largest magnitude, or that of a sum's terms together

    @property
    def verdict(self) -> str:
        limit = {"theirs": self.theirs, "ours": self.ours}
        off = [name for name, error in limit.items() if not within(error, self.plain, self.size)]
        return "agree" if not off else f"beyond 2x plain PyTorch's error: {', '.join(off)}"


def against(name: str) -> tuple[list[Row], str]:
    """Rows for every quantity that library `name` gives, and what was called.

    Raises ValueError when the library is unknown or cannot be used here.
    """
    if name not in LIBRARIES:
        raise ValueError(
            f"doctor: got --against {name}; expected one of {', '.join(LIBRARIES)}. Check the "
            "spelling."
        )
    problem = make_problem()
    rows, note = [], ""
    for dtype, kind in DTYPES.items():
        cast = problem.to(kind)
        theirs = LIBRARIES[name](cast)
        note = theirs.note or note
        rows += compare(dtype, theirs, cast)
    return rows, note


def compare(dtype: str, theirs: Results, problem: Problem) -> list[Row]:
    """One row for each quantity that `theirs` has."""
    mine = ours(problem, backend="auto").values
    yard = Yardstick.of(problem, plain(problem))
    found = []
    for quantity in QUANTITIES:
        if quantity not in theirs.values:
            continue
        got, own, truth = theirs.values[quantity], mine[quantity], yard.truth[quantity]
        pairs = (got, own), (got, truth), (own, truth), (yard.honest[quantity], truth)
        numbers = [errors(a, b)[1] for a, b in pairs]
        numbers.append(float(yard.size.get(quantity, truth).abs().max()))
        found.append(Row(dtype, quantity, *numbers))
    return found

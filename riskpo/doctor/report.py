"""What `riskpo doctor` prints and writes, and the comparison with another library on one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from riskpo.doctor.libraries import LIBRARIES, ops
from riskpo.doctor.loss_traps import LOSS_TRAPS, Loss, LossTrap, pose_loss
from riskpo.doctor.machine import Check, machine_checks, version, versions
from riskpo.doctor.packages import PACKAGES, Missing
from riskpo.doctor.problem import Problem, Results, Yardstick, make_problem, ours, plain
from riskpo.doctor.seen import rows
from riskpo.doctor.tolerance import errors, within
from riskpo.doctor.traps import TRAPS, Trap, pose

HEADER = ("dtype", "quantity", "theirs - ours", "theirs - fp64", "ours - fp64", "plain - fp64")
REPORTED = ("torch", "liger", "trl", "verl")
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


def print_machine(model: str | None = None) -> None:
    """Versions, then one line per check of the machine, or of a model on it; ValueError when any
    failed."""
    for name, what in versions().items():
        print(f"{name:<14} {what}")
    print()
    failed = 0
    for check in checks_of(model):
        failed += check.ok is False
        print(check)
    if failed:
        raise ValueError(f"doctor: {failed} of the checks above failed.")
    print("\nAll checks that can run here passed.")


def checks_of(model: str | None) -> Iterable[Check]:
    if model is None:
        return machine_checks()
    from riskpo.doctor.own_model import model_checks  # needs transformers

    return model_checks(model)


def print_comparison(name: str) -> None:
    """Largest differences between library `name` and ours, and the verdict."""
    found, note = against(name)
    package = PACKAGES[name]
    print(f"{package} {version(package)}: {note}")
    print("largest absolute differences; same hidden states, advantages, masks and old log-probs\n")
    line = "{:<6} {:<9} " + "{:>14} " * 4 + " {}"
    print(line.format(*HEADER, "verdict"))
    for row in found:
        print(line.format(*cells(row), row.verdict))


def cells(row: Row) -> list[str]:
    numbers = (row.difference, row.theirs, row.ours, row.plain)
    return [row.dtype, row.quantity, *(f"{x:.1e}" for x in numbers)]


def report(say: Callable[[str], None], old: str = "") -> str:
    """The conformance report: what was seen here with the versions installed here. What the old
    report says before its versions stays: it may link to others."""
    said, is_report, _ = old.partition(VERSIONS)
    introduction = said.rstrip("\n") + "\n" if is_report else INTRODUCTION
    parts = [introduction, VERSIONS, table(("", ""), versions().items())]
    say("checking this machine")
    parts += ["## This machine\n", "```", *map(str, machine_checks()), "```\n"]
    for name in REPORTED:
        say(f"comparing with {name}")
        parts += [f"## Against {name}\n", *comparison(name)]
    say("setting the traps")
    parts += ["## Log-prob functions and the traps\n", TRAPS_NOTE, trap_matrix()]
    parts += ["## Policy losses and the traps\n", LOSS_NOTE, loss_matrix()]
    return "\n".join(parts)


def comparison(name: str) -> list[str]:
    try:
        found, note = against(name)
    except ValueError as error:
        return [f"Not compared: {error}\n"]
    return [f"{note}.\n", table((*HEADER, "verdict"), ([*cells(r), r.verdict] for r in found))]


def installed(try_it: Callable[[], object]) -> bool:
    """False where a library's function is not to be had; other errors are for the matrix."""
    try:
        try_it()
    except Exception as error:
        return not isinstance(error, Missing)
    return True


def trap_matrix() -> str:
    """Traps down, the log-prob functions that are installed across."""
    probe = rows(2, 8, 16)
    columns = [op for op in ops().values() if installed(partial(op.call, *probe, 1.0))]
    head = [f"{op.name}<br>{op.package} {version(op.package)}" for op in columns]
    lines = ([linked(trap), *(str(pose(trap, op)) for op in columns)] for trap in TRAPS)
    return table(("trap", *head), lines)


def loss_matrix() -> str:
    """Traps down, the policy losses that are installed across."""
    problem = make_problem()
    losses: dict[str, Loss] = {"riskpo": partial(ours, backend="auto"), **LIBRARIES}
    del losses["torch"]  # it has no policy loss of its own
    found = {k: loss for k, loss in losses.items() if installed(partial(loss, problem))}
    lines = (
        [linked(trap), *(str(pose_loss(trap, x)) for x in found.values())] for trap in LOSS_TRAPS
    )
    return table(("trap", *found), lines)


def linked(trap: Trap | LossTrap) -> str:
    name = trap.name.replace("[", "\\[")
    return f"[{name}](https://github.com/{trap.origin})" if trap.origin else name


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table, with an empty line after it."""
    body = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in body) + "\n"


VERSIONS = "## Versions\n"
INTRODUCTION = """# Conformance report

Written by `riskpo doctor --report FILE.md` on the machine and with the versions below. It says what
was seen, not why. "Against": largest absolute differences, log-probs and entropies in nats; "agree"
means that both are within twice plain PyTorch's error.
"""
TRAPS_NOTE = """\
Relative errors against float64 beside their limit, twice the error of plain PyTorch with float32
logits in the same dtype; or yes and no, or the error that was raised. Bold is beyond the limit, or
no. A function's own contract may exclude a case (TRL's op wants valid ids: its trainer sees to that
before the call). A link leads to a thread where the trap was met.
"""
LOSS_NOTE = """\
GRPO's token-level clipped loss, 0.2 / 0.2, mean over sequences, in float32: relative errors of loss
and gradients against float64. A response without tokens counts among the six of the mean here; a
mean over the other five differs by 0.2.
"""

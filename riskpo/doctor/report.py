"""What `riskpo doctor` prints and writes, and the comparison with another library on one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from riskpo.doctor.check import Check
from riskpo.doctor.libraries import LIBRARIES, ops
from riskpo.doctor.loss_traps import LOSS_TRAPS, LossTrap, pose_loss
from riskpo.doctor.machine import machine_checks, versions
from riskpo.doctor.packages import PACKAGES, Missing, version
from riskpo.doctor.problem import Problem, Results, Yardstick, make_problem, ours, plain
from riskpo.doctor.tolerance import errors
from riskpo.doctor.traps import TRAPS, Trap, pose, rows

REPORTED = ("torch", "liger", "trl", "verl")
QUANTITIES = ("logprob", "entropy", "loss", "dhidden", "dweight")  # that libraries give
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Row(NamedTuple):
    """One quantity in one dtype; the errors are largest absolute differences."""

    dtype: str
    quantity: str
    difference: float  # theirs - ours
    theirs: float  # theirs - float64
    ours: float  # ours - float64
    plain: float  # plain PyTorch in this dtype - float64; of the loss: summed over its terms
    verdict: str


HEADER = ("dtype", "quantity", "theirs - ours", "theirs - fp64", "ours - fp64", "plain - fp64",
          "verdict")  # fmt: skip


def against(name: str) -> list[Row]:
    """A row for every quantity that library `name` gives; ValueError where it is not installed."""
    problem, (library, _) = make_problem(), LIBRARIES[name]
    casts = {dtype: problem.to(kind) for dtype, kind in DTYPES.items()}
    return [row for dtype, x in casts.items() for row in compare(dtype, library(x), x)]


def compare(dtype: str, theirs: Results, problem: Problem) -> list[Row]:
    """One row for each quantity that `theirs` has."""
    mine, yard = ours(problem, backend="auto"), Yardstick.of(problem, plain(problem))
    found = []
    for quantity in QUANTITIES:
        if quantity not in theirs:
            continue
        got, own, truth = theirs[quantity], mine[quantity], yard.truth[quantity]
        far, near = (yard.bounds(quantity, x)[1] for x in (got, own))
        off = ", ".join(who for who, x in (("theirs", far), ("ours", near)) if not x.holds)
        verdict = f"beyond 2x plain PyTorch's error: {off}" if off else "agree"
        _, apart = errors(got.double() - own.double(), torch.zeros(()))
        _, honest = errors(yard.honest[quantity], truth)
        found.append(Row(dtype, quantity, apart, far.error, near.error, honest, verdict))
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
    package = PACKAGES[name]
    print("Largest absolute differences; same hidden states, advantages, masks and old log-probs.")
    print(f"{package} {version(package)}: {comparison(name)}", end="")


def comparison(name: str) -> str:
    """What was called of a library, and a table of its rows."""
    lines = ([f"{x:.1e}" if isinstance(x, float) else x for x in row] for row in against(name))
    return f"{LIBRARIES[name][1]}.\n\n{table(HEADER, lines)}"


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
        try:
            found = comparison(name)
        except ValueError as error:
            found = f"Not compared: {error}\n"
        parts += [f"## Against {name}\n", found]
    say("setting the traps")
    parts += ["## Log-prob functions and the traps\n", TRAPS_NOTE, trap_matrix()]
    parts += ["## Policy losses and the traps\n", LOSS_NOTE, loss_matrix()]
    return "\n".join(parts)


def installed(try_it: Callable[[], object]) -> bool:
    """False where a library's function is not to be had; other errors are for the matrix."""
    try:
        try_it()
    except Exception as error:
        return not isinstance(error, Missing)
    return True


def trap_matrix() -> str:
    """Traps down, the log-prob functions that are installed across."""
    columns = [op for op in ops().values() if installed(partial(op.call, *rows(2, 8, 16), 1.0))]
    head = [f"{op.name}<br>{op.package} {version(op.package)}" for op in columns]
    lines = ([linked(trap), *(pose(trap, op).cell for op in columns)] for trap in TRAPS)
    return table(("trap", *head), lines)


def loss_matrix() -> str:
    """Traps down, the policy losses that are installed across."""
    problem, losses = make_problem(), {name: loss for name, (loss, _) in LIBRARIES.items()}
    del losses["torch"]  # it has no policy loss of its own
    losses = {"riskpo": partial(ours, backend="auto"), **losses}
    found = {k: loss for k, loss in losses.items() if installed(partial(loss, problem))}
    lines = ([linked(t), *(pose_loss(t, x).cell for x in found.values())] for t in LOSS_TRAPS)
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

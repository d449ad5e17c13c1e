"""What `riskpo doctor` prints and writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from riskpo.doctor.against import Row, against
from riskpo.doctor.libraries import LIBRARIES, ops
from riskpo.doctor.loss_traps import LOSS_TRAPS, Loss, LossTrap, pose_loss
from riskpo.doctor.machine import machine_checks, version, versions
from riskpo.doctor.packages import PACKAGES, Missing
from riskpo.doctor.problem import make_problem, ours
from riskpo.doctor.seen import rows
from riskpo.doctor.traps import TRAPS, Trap, pose

HEADER = ("dtype", "quantity", "theirs - ours", "theirs - fp64", "ours - fp64", "plain - fp64")
REPORTED = ("torch", "liger", "trl", "verl")


def print_machine() -> None:
    """Versions, then one line per check; ValueError when any of them failed."""
    for name, what in versions().items():
        print(f"{name:<14} {what}")
    print()
    failed = 0
    for check in machine_checks():
        failed += check.ok is False
        print(check)
    if failed:
        raise ValueError(f"doctor: {failed} of the checks above failed.")
    print("\nAll checks that can run here passed.")


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


def report(say: Callable[[str], None]) -> str:
    """The conformance report: what was seen here with the versions installed here."""
    parts = [INTRODUCTION, "## Versions\n", table(("", ""), versions().items())]
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

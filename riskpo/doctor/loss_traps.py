"""Batches on which policy losses have been wrong before, run on each library's own loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from riskpo.doctor.check import Check, first_line
from riskpo.doctor.problem import Problem, Results, Yardstick, make_problem, ours, plain

Loss = Callable[[Problem], Results]


def same(problem: Problem) -> Problem:
    return problem


def without(problem: Problem, response: int) -> Problem:
    """The problem with one response that has no token."""
    mask = problem.mask.clone()
    mask[response] = False
    return replace(problem, mask=mask)


def behind_the_mask(problem: Problem, value: float) -> Problem:
    """Old log-probs of tokens that were never sampled."""
    return replace(problem, old_logprob=problem.old_logprob.where(problem.mask, value))


@dataclass(frozen=True)
class LossTrap:
    """spoil(problem) is what a library gets, clean(problem) what the truth is computed from.

    origin: a thread on GitHub where it was met, or "".
    """

    name: str
    origin: str = ""
    spoil: Callable[[Problem], Problem] = same
    clean: Callable[[Problem], Problem] = same


def zero(problem: Problem) -> Problem:
    return replace(problem, advantage=torch.zeros_like(problem.advantage))


LOSS_TRAPS = (
    LossTrap("GRPO's clipped loss", "linkedin/Liger-Kernel/issues/1082"),
    LossTrap("NaN old log-probs behind the mask", "", lambda p: behind_the_mask(p, torch.nan)),
    # exp(log-ratio) overflows there, and infinity times 0 is NaN
    LossTrap("log-ratios of 1e4 behind the mask", "", lambda p: behind_the_mask(p, -1e4)),
    # its length must not divide anything
    LossTrap("a response without tokens", "", lambda p: without(p, 2), lambda p: without(p, 2)),
    LossTrap("all advantages 0: loss and gradients 0", "", zero, zero),
)


def pose_loss(trap: LossTrap, loss: Loss) -> Check:
    """Loss, dhidden and dweight against float64, float32 inputs; the worst one is reported."""
    problem = make_problem()
    clean = trap.clean(problem)
    honest = plain(clean) if clean.mask.any(1).all() else ours(clean, backend="reference")
    yard = Yardstick.of(clean, honest)
    try:
        got = loss(trap.spoil(problem))
    except Exception as error:  # an observation, not a failure of the report
        return Check(None, f"raises {first_line(error)}")
    found = {}
    for name in ("loss", "dhidden", "dweight"):
        norm, largest = yard.bounds(name, got[name])
        found[name] = norm.error, norm.holds and largest.holds
    bad = [f"{name} {off:.1e}" for name, (off, ok) in found.items() if not ok]
    if bad:
        return Check(False, ", ".join(bad))
    return Check(True, f"{max(off for off, _ in found.values()):.1e}")

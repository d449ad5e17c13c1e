"""Batches on which policy losses have been wrong before, run on each library's own loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from riskpo.doctor.packages import first_line
from riskpo.doctor.problem import Problem, Results, Yardstick, make_problem, ours, plain
from riskpo.doctor.seen import Seen

Loss = Callable[[Problem], Results]


@dataclass(frozen=True)
class LossTrap:
    """spoil(problem) is what a library gets, clean(problem) what the truth is computed from.

    origin: a thread on GitHub where it was met, or "".
    """

    name: str
    origin: str
    spoil: Callable[[Problem], Problem]
    clean: Callable[[Problem], Problem]


def same(problem: Problem) -> Problem:
    return problem


def nan_behind_the_mask(problem: Problem) -> Problem:
    """What was never sampled may hold anything: here NaN as old log-prob."""
    return replace(problem, old_logprob=problem.old_logprob.where(problem.mask, torch.nan))


def far_behind_the_mask(problem: Problem) -> Problem:
    """exp(log-ratio) overflows on masked tokens, and infinity times 0 is NaN."""
    return replace(problem, old_logprob=problem.old_logprob.where(problem.mask, -1e4))


def empty_response(problem: Problem) -> Problem:
    """One response without a token; its length must not divide anything."""
    mask = problem.mask.clone()
    mask[2] = False
    return replace(problem, mask=mask)


def zero_advantages(problem: Problem) -> Problem:
    return replace(problem, advantage=torch.zeros_like(problem.advantage))


LOSS_TRAPS = (
    LossTrap("GRPO's clipped loss", "linkedin/Liger-Kernel/issues/1082", same, same),
    LossTrap("NaN old log-probs behind the mask", "", nan_behind_the_mask, same),
    LossTrap("log-ratios of 1e4 behind the mask", "", far_behind_the_mask, same),
    LossTrap("a response without tokens", "", empty_response, empty_response),
    LossTrap("all advantages 0: loss and gradients 0", "", zero_advantages, zero_advantages),
)


def pose_loss(trap: LossTrap, loss: Loss) -> Seen:
    """Loss, dhidden and dweight against float64, float32 inputs; the worst one is reported."""
    problem = make_problem()
    clean = trap.clean(problem)
    honest = plain(clean) if clean.mask.any(1).all() else ours(clean, backend="reference")
    yard = Yardstick.of(clean, honest)
    try:
        got = loss(trap.spoil(problem)).values
    except Exception as error:  # an observation, not a failure of the report
        return Seen(None, f"raises {first_line(error)}")
    found = {}
    for name in ("loss", "dhidden", "dweight"):
        norm, largest = yard.bounds(name, got[name])
        found[name] = norm.error, norm.holds and largest.holds
    bad = [f"{name} {off:.1e}" for name, (off, ok) in found.items() if not ok]
    if bad:
        return Seen(False, ", ".join(bad))
    return Seen(True, f"{max(off for off, _ in found.values()):.1e}")

"""Conditional credit: what a response earns, averaged over all pairings of its bundle.

A response with reward r sits in a draw of score S + r. S sums one response of each of the other
B - 1 questions of its bundle. RiskPO (arXiv 2510.00911) credits A(S + r) of the pairing it drew.
The conditional expectation

    c(r) = E[A(S + r)],        S = sum of one uniform draw from each other question's G rewards

has the same expected gradient and less variance (Rao-Blackwell). The distribution of S is the
convolution of the other questions' empirical rewards. It is exact while S has at most MAX_SUPPORT
different values: always for rewards with few values (right or wrong), and for any rewards while
G^(B-1) is that small. Beyond it S is sampled, SAMPLES seeded draws a question, and the standard
error is reported.

For rewards in {0, 1} c(r) = c(0) + r w, w = E[A(S + 1) - A(S)]: the question's weight. With random
bundles w is the same for all questions in expectation; with bundles of like difficulty it falls
from 1 + omega for hard questions to 0 for easy ones. The derivation: docs/risk.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from riskpo_kernels.advantages.presets import RiskPOSettings
from riskpo_kernels.reference.pairing import sampling_seed
from riskpo_kernels.risk import mvar_advantage

MAX_SUPPORT = 2**16  # values of S; 1 MiB in float64
SAMPLES = 4096
SAME = (
    1e-9  # scores closer than this, of the largest, are one value: sums of 0.1 differ by rounding
)

Advantage = Callable[[torch.Tensor], torch.Tensor]  # scores -> A(scores), elementwise


class Distribution(NamedTuple):
    """values [n], rising, with their probabilities [n]; float64. exact: not sampled."""

    values: torch.Tensor
    probs: torch.Tensor
    exact: bool = True


class Credit(NamedTuple):
    """Of K bundles: credit [K, B, G]; the variance of A(S + r) over pairings, the same shape.

    weight [K, B] is the slope of c. error is the largest standard error of a credit, 0 where all
    are exact.
    """

    credit: torch.Tensor
    variance: torch.Tensor
    weight: torch.Tensor
    error: float


def conditional_advantage(
    r: torch.Tensor,
    tables: Sequence[tuple[Sequence[str], torch.Tensor]],
    quantiles: tuple[float, float],
    s: RiskPOSettings,
    step: int,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Advantages [N], before scaling, of rewards r [N], and statistics.

    tables: (questions, rows [Q', G]) of each bundling, B questions in a run a bundle; a row that
    is in none (a dropped question) gets 0.

    variance_removed          share of the credits' variance that averaging over pairings takes away
    credit_error              largest standard error of a credit; 0: all are exact
    weight_hard, _middle, _easy   mean weight of the questions whose mean reward is in the lowest
                              fifth of the batch's range of rewards, between, in the highest fifth
    """

    def advantage(x: torch.Tensor) -> torch.Tensor:
        return risk_advantage(x, quantiles, s)

    bundled_rows = torch.cat([rows.flatten() for _, rows in tables])
    ends = torch.stack([r[bundled_rows].min(), r[bundled_rows].max()])
    low, span = ends[0], ends[1] - ends[0]
    if span == 0:  # all alike: the slope over one unit of reward
        span, ends = torch.ones_like(span), torch.stack([low, low + 1])
    result, credit, variance, weight = (torch.zeros_like(r) for _ in range(4))
    difficulty, error = torch.full_like(r, torch.nan), 0.0
    for names, rows in tables:
        own_seeds = [sampling_seed(name, seed=s.seed, step=step) for name in names]
        bundled = r[rows].unflatten(0, (-1, s.bundle_size))
        starts = range(0, len(own_seeds), s.bundle_size)
        seeds = [own_seeds[i:][: s.bundle_size] for i in starts]
        found = conditional_credit(bundled, advantage, seeds, ends)
        own = found.credit.flatten(0, 1)
        credit[rows], variance[rows] = own, found.variance.flatten(0, 1)
        result[rows] = left_one_out(own) if s.baseline == "leave-one-out" else own
        weight[rows] = found.weight.flatten()[:, None].expand_as(own)
        difficulty[rows] = r[rows].mean(1, keepdim=True).expand_as(own)
        error = max(error, found.error)
    used = ~difficulty.isnan()
    if s.baseline == "batch":
        result[used] -= result[used].mean()
    # What rounding left of a 0 would pass for an advantage, and cost the response its update.
    result[result.abs() <= 1e-12 * credit.abs().max()] = 0.0
    noise, spread = float(variance[used].mean()), float(credit[used].var(correction=0))
    place = (difficulty - low) / span
    stats = {"variance_removed": noise / max(noise + spread, 1e-300), "credit_error": error}
    hard, easy = place < 0.2 - SAME, place > 0.8 + SAME
    classes = {"hard": hard, "middle": used & ~hard & ~easy, "easy": easy}
    return result, stats | {
        f"weight_{name}": float(weight[chosen].mean())
        for name, chosen in classes.items()
        if chosen.any()
    }


def risk_advantage(scores: torch.Tensor, q: Any, s: RiskPOSettings) -> torch.Tensor:
    """mvar_advantage at quantiles (q_alpha, q_beta), by the settings."""
    return mvar_advantage(
        scores,
        *q,
        form=s.form,
        alpha=s.alpha,
        beta=s.beta,
        omega=s.omega,
        w_mix=s.w_mix,
        natural=s.baseline == "natural",
        eps=s.eps,
    )


def left_one_out(a: torch.Tensor) -> torch.Tensor:
    """Each value minus the mean of the others in the last dimension."""
    d = a - a[..., :1]  # so that equal ones come out as exactly 0
    return d - (d.sum(-1, keepdim=True) - d) / (d.shape[-1] - 1)


def conditional_credit(
    r: torch.Tensor,
    advantage: Advantage,
    seeds: Sequence[Sequence[int]],
    ends: torch.Tensor,
) -> Credit:
    """Credit of every response: r [K, B, G] float64 rewards, seeds [K][B] ints of the sampling.

    ends [2]: the two rewards between which a question's weight is the slope of c.
    """
    K, B, G = r.shape
    credit, variance = torch.empty_like(r), torch.empty_like(r)
    weight = torch.empty(K, B, dtype=r.dtype)
    error = 0.0
    for k in range(K):
        for i, others in enumerate(sums_of_others(r[k], seeds[k])):
            a = advantage(others.values + torch.cat([r[k, i], ends])[:, None])  # [G + 2, n]
            mean = a @ others.probs
            spread = (a - mean[:, None]).square() @ others.probs
            credit[k, i], variance[k, i] = mean[:G], spread[:G]
            weight[k, i] = (mean[G + 1] - mean[G]) / (ends[1] - ends[0])
            if not others.exact:
                error = max(error, float((spread[:G] / SAMPLES).sqrt().max()))
    return Credit(credit, variance, weight, error)


def sums_of_others(r: torch.Tensor, seeds: Sequence[int]) -> list[Distribution]:
    """For each question of one bundle, r [B, G], the distribution of the others' sum."""
    zero = Distribution(torch.zeros(1, dtype=r.dtype), torch.ones(1, dtype=r.dtype))
    own = [_empirical(x) for x in r]
    before: list[Distribution | None] = [zero]
    after: list[Distribution | None] = [zero]
    for x, y in zip(own[:-1], own[:0:-1], strict=True):
        before.append(_convolved(before[-1], x))
        after.append(_convolved(after[-1], y))
    found = []
    for i, (left, right) in enumerate(zip(before, reversed(after), strict=True)):
        exact = _convolved(left, right)
        found.append(_sampled(r, i, seeds[i]) if exact is None else exact)
    return found


def _empirical(x: torch.Tensor) -> Distribution:
    return _merged(x, torch.full_like(x, 1 / len(x)))


def _convolved(a: Distribution | None, b: Distribution | None) -> Distribution | None:
    """The sum of two independent ones; None where it has too many values."""
    if a is None or b is None or len(a.values) * len(b.values) > MAX_SUPPORT:
        return None
    values = (a.values[:, None] + b.values).flatten()
    return _merged(values, (a.probs[:, None] * b.probs).flatten())


def _merged(values: torch.Tensor, probs: torch.Tensor) -> Distribution:
    """Values that differ by rounding become one, their mean."""
    order = values.argsort(stable=True)
    values, probs = values[order], probs[order]
    gap = SAME * max(float(values.abs().max()), 1e-300)
    group = torch.cat([values.new_zeros(1), (values.diff() > gap).to(values)]).cumsum(0).long()
    n = int(group[-1]) + 1
    mass = probs.new_zeros(n).index_add(0, group, probs)
    return Distribution(values.new_zeros(n).index_add(0, group, values * probs) / mass, mass)


def _sampled(r: torch.Tensor, i: int, seed: int) -> Distribution:
    """SAMPLES draws of the sum over all questions but i."""
    g = torch.Generator().manual_seed(seed)
    others = torch.cat([r[:i], r[i + 1 :]])
    chosen = torch.randint(r.shape[1], (len(others), SAMPLES), generator=g)
    values = others.gather(1, chosen).sum(0)
    return Distribution(values, torch.full_like(values, 1 / SAMPLES), exact=False)

"""The one pass of clipped_surrogate on torch tensors; memory O(N), any device.

The equations stand in riskpo_kernels.reference.surrogate. The slope of the loss at token t is
weight_t df/dx_t for both kinds of ratio: with the sequence ratio, a token's share 1 / length in x
cancels against the length terms that x enters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from riskpo_kernels.policy_loss.checks import Options
from riskpo_kernels.reference import formulas
from riskpo_kernels.reference.surrogate import BOUND, KL, Sequences


@dataclass(frozen=True)
class Problem:
    """Everything the pass reads beside logprob and entropy; nothing here gets a gradient."""

    old: torch.Tensor  # [N]
    advantage: torch.Tensor  # [S] or [N], times the correction
    advantage_per_token: bool
    ref: torch.Tensor | None  # [N]
    mask: torch.Tensor | None  # [N]
    cu_seqlens: torch.Tensor  # [S + 1]
    sequences: int  # the caller's, where cu_seqlens may hold chunks
    group: Any  # process group whose ranks hold parts of the same sequences, or None
    clip: tuple[float, float, float]  # lower, upper, dual: bounds of the ratio
    options: Options


class Sums(NamedTuple):
    """0-d sums over the counted tokens; from `units` on over the ratio's units, which are tokens
    or sequences."""

    loss: torch.Tensor
    tokens: torch.Tensor
    kl: torch.Tensor
    kl_tokens: torch.Tensor  # what has no weight and is NaN is left out of its mean
    entropy: torch.Tensor
    entropy_tokens: torch.Tensor
    zero: torch.Tensor  # tokens whose slopes are all zero
    units: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    cut: torch.Tensor
    ratio: torch.Tensor
    ratio_units: torch.Tensor
    ratio_max: torch.Tensor


class PassResult(NamedTuple):
    """Slopes of the loss times its denominator, and the sums."""

    dlogprob: torch.Tensor  # [N]
    dentropy: torch.Tensor | None  # [N]
    sums: Sums


def torch_pass(logprob: torch.Tensor, entropy: torch.Tensor | None, p: Problem) -> PassResult:
    """logprob and entropy [N], in the dtype to compute in."""
    o, wide = p.options, logprob.dtype
    sequences = Sequences.of(logprob, p.cu_seqlens, p.mask, p.group)
    new = sequences.tokens(logprob, wide)
    a = p.advantage if p.advantage_per_token else p.advantage[sequences.segment]
    a = sequences.tokens(a, wide)
    weight = sequences.weight(mean=o.aggregate == "sequence-mean", dtype=wide)
    unit = sequences.weight(mean=o.ratio == "sequence", dtype=wide)

    x = new - sequences.tokens(p.old, wide)
    x = sequences.mean(x)[sequences.segment] if o.ratio == "sequence" else x
    r = torch.exp(formulas.bounded(x, BOUND[o.ratio]))
    low, high, dual = formulas.cuts(r, a, *p.clip)
    cut = low | high | dual
    term = formulas.surrogate(r, a, *p.clip)
    slope = formulas.surrogate_slope(r, a, cut | formulas.saturated(x, BOUND[o.ratio]))

    counted = sequences.counted
    kl = h = torch.zeros_like(new)
    if p.ref is not None:
        kl, kl_slope = _kl(sequences.tokens(p.ref, wide) - new, o.kl)
        if o.kl_coef != 0:
            term, slope = term + o.kl_coef * kl, slope + o.kl_coef * kl_slope
    if entropy is not None:
        h = sequences.tokens(entropy, wide)
        term = term - o.entropy_coef * h if o.entropy_coef != 0 else term
    # where, not only weight: a NaN that counts makes the whole sequence's slopes NaN
    dlogprob = torch.where(counted, weight * slope, 0.0)
    dentropy = None if entropy is None else -o.entropy_coef * weight
    zero = dlogprob == 0 if dentropy is None else (dlogprob == 0) & (dentropy == 0)

    seen = counted & ((a != 0) | (r == r))
    means = (*_sum_and_count(kl, counted, o.kl_coef), *_sum_and_count(h, counted, o.entropy_coef))
    tokens = ((weight * term).sum(), counted.sum(), *means, (counted & zero).sum())
    units = (unit.sum(), *((unit * y).sum() for y in (low, high, cut)))
    ratio = (torch.where(seen, unit * r, 0.0).sum(), torch.where(seen, unit, 0.0).sum())
    ratio_max = torch.where(seen, r, 0.0).amax() if len(r) else r.sum()
    return PassResult(dlogprob, dentropy, Sums._make((*tokens, *units, *ratio, ratio_max)))


def _sum_and_count(
    x: torch.Tensor, counted: torch.Tensor, coef: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over the counted tokens, without the NaN among them where nothing rests on x."""
    seen = counted if coef != 0 else counted & (x == x)
    return torch.where(seen, x, 0.0).sum(), seen.sum()


def _kl(u: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence and its slope; masked tokens have u = 0, where every kind is 0."""
    divergence, slope = KL[kind](formulas.bounded(u, formulas.TOKEN_BOUND))
    return divergence, torch.where(formulas.saturated(u, formulas.TOKEN_BOUND), 0.0, slope)

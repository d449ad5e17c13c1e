"""The running softmax statistics of rows, tile by tile, in PyTorch (kernels/softmax_rows.py is the
same in Triton).

The target column is kept out of the running sum. With t the target and, over the other columns,

    m = max z_v      s = sum exp(z_v - m)      u = sum exp(z_v - m) (z_v - m)
    d = (m - z_t) + log s                      the log-odds against the target

everything follows without a cancellation, however close the row is to one-hot:

    logprob = -softplus(d)                     never above 0; relative accuracy as p -> 1
    1 - p_t = -expm1(logprob)
    H       = p softplus(d) + q softplus(-d) + q (log s - u / s),   q = 1 - p     never below 0

and the gradient for upstream c (of logprob), g (of entropy) and e (of lse) is

    dz_v = -p_v (c - e + g (log p_v + H))              v != t
    dz_t = (1 - p_t) c + p_t e - p_t g (logprob + H)
"""

from __future__ import annotations

import torch

from riskpo_kernels.core.rows import (
    BLOCK,
    FLOOR,
    LogitMap,
    RowGradient,
    RowState,
    RowStats,
)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)), exact to rounding in every dtype (torch's own cuts off at 20)."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def finish(state: RowState) -> RowStats:
    """The statistics of complete rows."""
    m, s, u, zt = state
    log_s = torch.log(s)
    # no other column: the target is certain (and a NaN is no zero)
    d = torch.where(s == 0, -torch.inf, (m - zt) + log_s)
    logprob = -softplus(d)
    peak = torch.maximum(m, zt)
    log_sum = torch.where(zt >= m, softplus(d), log_s + softplus(-d))
    entropy = None
    if u is not None:
        p, q = torch.exp(logprob), -torch.expm1(logprob)
        rest = torch.where(s == 0, 0.0, (log_s - u / s).clamp(min=0))
        against = softplus(-d).clamp(max=-FLOOR)  # 0 * inf where the target is certain
        entropy = p * softplus(d).clamp(max=-FLOOR) + q * (against + rest)
    return RowStats(logprob, entropy, peak, log_sum)


def fold(
    raw: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    state: RowState,
    map: LogitMap,
    blocks: torch.Tensor | None = None,
) -> None:
    """Fold a tile of raw logits [R, C] (overwritten) into `state`; target [R] counts from the
    tile's first column and may lie outside it. blocks [R, C / 128] takes the log-sum-exp of each
    run of 128 columns, the target left out."""
    z, _ = mapped(raw, bias, map, slope=False)
    cols = z.shape[1]
    here = (target >= 0) & (target < cols)
    at = target.clamp(0, cols - 1)[:, None]
    found = z.gather(1, at)
    state.zt.copy_(torch.where(here, found[:, 0], state.zt))
    z.scatter_(1, at, found.masked_fill(here[:, None], -torch.inf))

    m = torch.maximum(state.m, z.amax(1))
    anchor = torch.where(m == -torch.inf, 0.0, m)  # -inf - -inf is NaN
    shift = (state.m - anchor).clamp(min=FLOOR)
    keep = torch.exp(shift)
    z.sub_(anchor[:, None])
    if state.u is None:
        e = z.exp_()
    else:
        z.clamp_(min=FLOOR)
        e = torch.exp(z)
        state.u.add_(state.s * shift).mul_(keep)
    if blocks is None:
        state.s.mul_(keep).add_(e.sum(1))
    else:
        sums = _block_sums(e)
        state.s.mul_(keep).add_(sums.sum(1))
        blocks.copy_(sums.log_().add_(anchor[:, None]))
    if state.u is not None:
        state.u.add_(e.mul_(z).sum(1))
    state.m.copy_(m)


def _block_sums(e: torch.Tensor) -> torch.Tensor:
    """Sums [R, ceil(C / 128)] over runs of 128 columns."""
    whole = e.shape[1] // BLOCK * BLOCK
    sums = e[:, :whole].unflatten(1, (-1, BLOCK)).sum(2)
    if whole == e.shape[1]:
        return sums
    return torch.cat([sums, e[:, whole:].sum(1, keepdim=True)], 1)


def gradient(
    raw: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    up: RowGradient,
    map: LogitMap,
    out: torch.Tensor,
) -> torch.Tensor:
    """The gradient of a tile's raw logits [R, C] (overwritten), into `out` (which may be raw)."""
    cols = raw.shape[1]
    z, slope = mapped(raw, bias, map, slope=True)
    log_p = z.sub_(up.peak[:, None]).sub_(up.log_sum[:, None])
    if up.slope is None:
        dz = log_p.exp_().mul_(-up.offset[:, None])
    else:
        p = log_p.clamp_(min=FLOOR).exp()
        dz = log_p.mul_(-up.slope[:, None]).sub_(up.offset[:, None]).mul_(p)
    here = (target >= 0) & (target < cols)
    at = target.clamp(0, cols - 1)[:, None]
    dz.scatter_(1, at, torch.where(here[:, None], up.at_target[:, None], dz.gather(1, at)))
    if slope is not None:
        dz.mul_(slope)
    return dz if out is dz else out.copy_(dz)


def mapped(
    raw: torch.Tensor, bias: torch.Tensor | None, map: LogitMap, slope: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """raw -> z in place, and softcap'(scale * raw) when there is a softcap and it is wanted."""
    if bias is not None:
        raw.add_(bias)
    if map.softcap is None:
        factor = map.scale / map.column()
        return (raw if isinstance(factor, float) and factor == 1 else raw.mul_(factor)), None
    raw.mul_(map.scale / map.softcap).tanh_()
    capped = raw.square().neg_().add_(1) if slope else None
    return raw.mul_(map.softcap / map.column()), capped

"""Rows of logits: how they are made, their softmax statistics tile by tile, their gradient.

In PyTorch; kernels/ has the same in Triton. The target column is kept out of the running sum: with
t the target and, over the other columns,

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

from typing import NamedTuple

import torch

BLOCK = 128  # columns of a vocabulary block, whose gradient is kept or dropped as one
IGNORED = -(2**62)  # a target that says: do not read this row
FLOOR = -1000.0  # of log-probabilities: exp is 0 there in every dtype, and 0 * FLOOR is not NaN


class LogitMap(NamedTuple):
    """z = softcap(scale * (raw + bias)) / temperature; temperature is a float or one per row."""

    scale: float
    softcap: float | None
    temperature: float | torch.Tensor

    def of(self, rows: slice | torch.Tensor) -> LogitMap:
        """The map of some of the rows."""
        if isinstance(self.temperature, torch.Tensor):
            return self._replace(temperature=self.temperature[rows])
        return self

    def slope(self, z: torch.Tensor) -> torch.Tensor:
        """Derivative of the softcap where z [R] came out."""
        assert self.softcap is not None
        return (1 - (z * self.temperature / self.softcap).square()).clamp(min=0.0)

    def factors(self) -> tuple[float, float, torch.Tensor | None]:
        """(inner, outer, T): z = outer raw / T, with a softcap outer tanh(inner raw) / T; T is one
        per row, or None and a part of outer."""
        inner = 1.0 if self.softcap is None else self.scale / self.softcap
        outer = self.scale if self.softcap is None else self.softcap
        if isinstance(self.temperature, torch.Tensor):
            return inner, outer, self.temperature
        return inner, outer / self.temperature, None

    def column(self) -> float | torch.Tensor:
        """The temperature, shaped to broadcast over a tile."""
        t = self.temperature
        return t[:, None] if isinstance(t, torch.Tensor) else t


class RawTile(NamedTuple):
    """A tile of products raw [R, C], and what makes logits of them."""

    raw: torch.Tensor
    bias: torch.Tensor | None  # [C]
    map: LogitMap


class RowState(NamedTuple):
    """m, s, u, z_t of every row; u is None when no entropy is wanted."""

    m: torch.Tensor
    s: torch.Tensor
    u: torch.Tensor | None
    zt: torch.Tensor

    @staticmethod
    def new(n: int, entropy: bool, like: torch.Tensor, dtype: torch.dtype) -> RowState:
        def full(value: float) -> torch.Tensor:
            return torch.full((n,), value, dtype=dtype, device=like.device)

        return RowState(full(-torch.inf), full(0), full(0) if entropy else None, full(-torch.inf))

    def of(self, rows: slice | torch.Tensor) -> RowState:
        """Some of the rows: views for a slice, copies for an index."""
        return RowState(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]

    def put(self, rows: slice, part: RowState) -> None:
        """The state of these rows; rows of `part` beyond them are padding."""
        for x, y in zip(self, part, strict=True):
            if x is not None and y is not None:
                x[rows] = y[: rows.stop - rows.start]


class RowStats(NamedTuple):
    """What the results and the backward need; lse = peak + log_sum."""

    logprob: torch.Tensor
    entropy: torch.Tensor | None
    peak: torch.Tensor
    log_sum: torch.Tensor

    def of(self, rows: slice | torch.Tensor) -> RowStats:
        return RowStats(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


class RowGradient(NamedTuple):
    """What the gradient of a row needs beside its logits; lse = peak + log_sum.

    dz_v = -p_v (offset + slope log p_v)   v != t        dz_t = at_target

    All three are 0 where no gradient was sent; slope is None where none was sent to an entropy.
    scale and temperature are in them: their chain rule costs no pass over a tile.
    """

    at_target: torch.Tensor
    offset: torch.Tensor
    slope: torch.Tensor | None
    peak: torch.Tensor
    log_sum: torch.Tensor

    @staticmethod
    def new(
        stats: RowStats,
        c: torch.Tensor | None,
        g: torch.Tensor | None,
        e: torch.Tensor | None,
        map: LogitMap,
    ) -> RowGradient:
        """Of the upstream gradients of logprob, entropy and lse, None where none was sent."""
        logprob = stats.logprob.clamp(min=FLOOR)  # 0 * -inf is NaN
        p = torch.exp(logprob)
        at_target, offset = torch.zeros_like(p), torch.zeros_like(p)
        slope, sent = None, at_target != 0
        if c is not None:
            at_target -= c * torch.expm1(logprob)
            offset += c
            sent |= c != 0
        if e is not None:
            at_target += e * p
            offset -= e
            sent |= e != 0
        if g is not None and stats.entropy is not None:
            at_target -= g * p * (logprob + stats.entropy)
            offset += g * stats.entropy
            slope = g * (map.scale / map.temperature)
            sent |= g != 0
        # a row without an upstream gradient is not read: a NaN in it stays there
        at_target, offset = (
            torch.where(sent, x * (map.scale / map.temperature), 0.0) for x in (at_target, offset)
        )
        return RowGradient(at_target, offset, slope, stats.peak, stats.log_sum)

    @property
    def parts(self) -> list[torch.Tensor]:
        """What is linear in the upstream gradients."""
        return [x for x in (self.at_target, self.offset, self.slope) if x is not None]

    def live(self) -> torch.Tensor:
        """Rows whose gradient is not zero throughout, bool."""
        return torch.stack([x != 0 for x in self.parts]).any(0)

    def divided(self, unit: torch.Tensor) -> RowGradient:
        """The gradient in units of another number."""
        slope = None if self.slope is None else self.slope / unit
        return self._replace(
            at_target=self.at_target / unit, offset=self.offset / unit, slope=slope
        )

    def of(self, rows: slice | torch.Tensor) -> RowGradient:
        return RowGradient(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


def relative_to(m: torch.Tensor, part: RowState) -> tuple[torch.Tensor, torch.Tensor | None]:
    """s and u of a part of the columns, as if its maximum had been m, that of all of them."""
    anchor = torch.where(m == -torch.inf, 0.0, m)  # -inf - -inf is NaN
    shift = (part.m - anchor).clamp_(min=FLOOR)
    keep = torch.exp(shift)
    return part.s * keep, None if part.u is None else keep * (part.u + part.s * shift)


SHARE = 20  # at most memory_mib / SHARE stays allocated between the forward and the backward


def kept_columns(rows: int, vocab: int, itemsize: int, memory_mib: float) -> int:
    """How many columns' logits are kept; whole blocks, or all columns."""
    fitting = int(memory_mib * 2**20 / SHARE) // (itemsize * torch.sym_max(rows, 1))
    return torch.sym_min(vocab, fitting // BLOCK * BLOCK)


class KeptLogits(NamedTuple):
    """Raw logits [N, K] of the first K columns, which the backward need not compute again; row i
    is row i of the hidden states.

    A small head's fit in a small part of the workspace, whole or in part, in float32 (float64).
    Only the torch backend on a CPU keeps them: there the product is the cost; on a GPU this little
    is recomputed in microseconds.
    """

    raw: torch.Tensor

    def known(self, v: slice) -> int:
        """How many of the columns v, from the first on."""
        return min(max(self.raw.shape[1] - v.start, 0), v.stop - v.start)

    def save(self, rows: torch.Tensor | slice, v: slice, raw: torch.Tensor) -> None:
        """Keep what fits of a tile of columns v."""
        known = self.known(v)
        if known:
            self.raw[rows, v.start : v.start + known] = raw[:, :known]

    def load(self, rows: torch.Tensor | slice, v: slice, out: torch.Tensor) -> int:
        """Fill the known columns of a tile and say how many they are."""
        known = self.known(v)
        if known:
            columns = self.raw[:, v.start : v.start + known]
            if isinstance(rows, slice):
                out[:, :known] = columns[rows]
            else:
                torch.index_select(columns, 0, rows, out=out[:, :known])
        return known


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

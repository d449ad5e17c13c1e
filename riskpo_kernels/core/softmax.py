"""Rows of logits: how they are made, their softmax statistics tile by tile, which blocks matter.

In PyTorch; kernels/ has the same in Triton. The target column is kept out of the running sum: with
t the target and, over the other columns,

    m = max z_v      s = sum exp(z_v - m)      u = sum exp(z_v - m) (z_v - m)
    d = (m - z_t) + log s                      the log-odds against the target

everything follows without a cancellation, however close the row is to one-hot:

    logprob = -softplus(d)                     never above 0; relative accuracy as p -> 1
    1 - p_t = -expm1(logprob)
    H       = p softplus(d) + q softplus(-d) + q (log s - u / s),   q = 1 - p     never below 0

Under RL a policy's own tokens leave almost every block of 128 columns without probability, and the
gradient of such a block is below the rounding of the result. With s_b the block's mass without the
target column, H the row's entropy and m = max(1 - p_target, 2^-16), a block is dropped when

    no entropy asked for:      s_b < theta                                theta = eps min(1, 16 m)
    with an entropy:           max(s_b, E_b) < theta / 2                  E_b as below

and the target's own block never. The row's dropped mass may not exceed 32 theta: its threshold is
halved until it does not, or the row is kept whole. A column beside the target gets -p_v (c - e) of
the upstream gradients c of logprob and e of lse. So for every row and any vocabulary

    ||dropped dz||_1 <= 32 eps |c - e|
    ||dropped dz||_1 <= 256 eps max(||dz||_1 + |e|, 2^-15 |c - e|)

E_b = s_b (|log s_b + H| + log 128) bounds the block's sum of p |log p + H|. A kept logit near its
softcap has a smaller slope than a dropped one may have: eps is the row's own there, times the
slope at its largest logit or at its target's, whichever is smaller. Both bounds then hold for the
gradient of the raw logits, the second with the floor times that slope, and as long as next to no
mass lies below minus the largest logit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

BLOCK = 128  # columns of a vocabulary block, whose gradient is kept or dropped as one
IGNORED = -(2**62)  # a target that says: do not read this row
CAP = 32.0  # thresholds of mass that a row may lose in all
HALVINGS = 6
DEFAULT_EPS = {torch.bfloat16: 2.0**-14, torch.float16: 2.0**-18}  # 0 elsewhere: exact
# Above this share of active pairs the dense pass is taken. CPU: at 0.71 gathered rows were measured
# as fast as dense tiles. CUDA: a guess until it is measured.
DENSE_SHARE = {"cuda": 0.4, "cpu": 0.8}
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

    def factors(self) -> tuple[float | None, float, torch.Tensor | None]:
        """(inner, outer, T): z = outer raw / T, with a softcap outer tanh(inner raw) / T; T is one
        per row, or None and a part of outer."""
        inner = None if self.softcap is None else self.scale / self.softcap
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

    def put(self, rows: slice | torch.Tensor, part: RowState) -> None:
        """The state of these rows; rows of `part` beyond them are padding."""
        n = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        for x, y in zip(self, part, strict=True):
            if x is not None and y is not None:
                x[rows] = y[:n]


class RowStats(NamedTuple):
    """What the results and the backward need; lse = peak + log_sum."""

    logprob: torch.Tensor
    entropy: torch.Tensor | None
    peak: torch.Tensor
    log_sum: torch.Tensor

    def of(self, rows: slice | torch.Tensor) -> RowStats:
        return RowStats(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


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
        sums = block_sums(e)
        state.s.mul_(keep).add_(sums.sum(1))
        blocks.copy_(sums.log_().add_(anchor[:, None]))
    if state.u is not None:
        state.u.add_(e.mul_(z).sum(1))
    state.m.copy_(m)


def block_sums(e: torch.Tensor) -> torch.Tensor:
    """Sums [R, ceil(C / 128)] over runs of 128 columns."""
    whole = e.shape[1] // BLOCK * BLOCK
    sums = e[:, :whole].unflatten(1, (-1, BLOCK)).sum(2)
    if whole == e.shape[1]:
        return sums
    return torch.cat([sums, e[:, whole:].sum(1, keepdim=True)], 1)


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


def n_blocks(vocab: int) -> int:
    return -(-vocab // BLOCK)


def row_eps(eps: float, stats: RowStats, map: LogitMap) -> float | torch.Tensor:
    """eps of each row [R], smaller where a softcap leaves its kept logits a small slope."""
    if map.softcap is None:
        return eps
    target = stats.logprob + stats.peak + stats.log_sum
    return eps * torch.minimum(map.slope(stats.peak), map.slope(target))


def select(
    block_lse: torch.Tensor,
    target: torch.Tensor,
    stats: RowStats,
    eps: float | torch.Tensor,
    entropy: bool,
    cap: float = CAP,
) -> torch.Tensor:
    """The active pairs [R, B] (bool) of rows with block log-sum-exps [R, B] (target left out).
    eps: one for all or [R]. A target may lie outside these blocks; a row loses at most cap thetas
    of its mass here."""
    log_s = (block_lse - stats.peak[:, None]).sub_(stats.log_sum[:, None]).clamp_(max=0.0)
    mass = torch.exp(log_s)
    doubt = (-torch.expm1(stats.logprob)).clamp(min=2.0**-16)
    theta = eps * (16 * doubt).clamp(max=1.0)
    if entropy and stats.entropy is not None:
        theta = theta / 2
        spread = (log_s + stats.entropy[:, None]).abs_().add_(math.log(BLOCK)).mul_(mass)
        mass = torch.maximum(mass, spread.nan_to_num_(0.0))  # 0 * inf where a block is empty
    keep = keep_blocks(mass, theta, cap)
    block = target.div(BLOCK, rounding_mode="floor")
    at = block.clamp(0, keep.shape[1] - 1)
    return keep.scatter_(1, at[:, None], keep.gather(1, at[:, None]) | (block == at)[:, None])


def keep_blocks(mass: torch.Tensor, theta: torch.Tensor, cap: float = CAP) -> torch.Tensor:
    """Which of a row's blocks [R, B] have at least theta [R], less where all others would together
    hold more than cap thetas."""
    threshold = theta.clone()
    for _ in range(HALVINGS):
        dropped = mass.masked_fill(mass >= threshold[:, None], 0.0).sum(1)
        over = dropped > cap * theta
        if over.device.type == "cpu" and not over.any():  # elsewhere asking would synchronise
            break
        threshold = torch.where(over, threshold / 2, threshold)
    else:
        dropped = mass.masked_fill(mass >= threshold[:, None], 0.0).sum(1)
        threshold = torch.where(dropped > cap * theta, 0.0, threshold)
    # a row with a NaN has no threshold to be below: it is kept whole, and the NaN stays visible
    return ~(mass < threshold[:, None])


class ActiveBlocks(NamedTuple):
    """One bit per (block, row), V / 1024 bytes per row; and the rows that go the dense way."""

    bits: torch.Tensor  # uint8 [ceil(B / 8), n]
    dense: torch.Tensor  # bool [n]
    pairs: torch.Tensor  # int32 [n], active blocks of the row

    @staticmethod
    def new(vocab: int, n: int, device: torch.device) -> ActiveBlocks:
        return ActiveBlocks(
            torch.zeros(-(-n_blocks(vocab) // 8), n, dtype=torch.uint8, device=device),
            torch.zeros(n, dtype=torch.bool, device=device),
            torch.zeros(n, dtype=torch.int32, device=device),
        )

    def record(self, rows: slice, keep: torch.Tensor, by_row: bool) -> None:
        """Store the active pairs [R, B] of `rows`, and choose the dense path by their share: of
        all these rows together, or of each alone (then no other row can sway the choice)."""
        r, b = keep.shape
        padded = torch.zeros(r, self.bits.shape[0] * 8, dtype=torch.uint8, device=keep.device)
        padded[:, :b] = keep
        shifts = torch.arange(8, dtype=torch.uint8, device=keep.device)
        packed = (padded.view(r, -1, 8) << shifts).sum(-1, dtype=torch.uint8)
        self.bits[:, rows] = packed.T
        count = keep.sum(1, dtype=torch.int32)
        self.pairs[rows] = count
        share = (count if by_row else count.float().mean()) / b
        self.dense[rows] = share > DENSE_SHARE["cuda" if keep.is_cuda else "cpu"]

    def of(self, rows: slice | torch.Tensor) -> ActiveBlocks:
        return ActiveBlocks(self.bits[:, rows], self.dense[rows], self.pairs[rows])

    def among(self, rows: torch.Tensor) -> ActiveBlocks:
        """No block of the other rows (bool [n]) is active."""
        return self._replace(bits=self.bits * rows)

    def counts(self, vocab: int) -> torch.Tensor:
        """Rows in which each block is active, int64 [B]."""
        bits = self.bits
        shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
        each = [((bits >> s) & 1).sum(1, dtype=torch.int64) for s in shifts]
        return torch.stack(each, 1).reshape(-1)[: n_blocks(vocab)]

    def pair_rows(self, blocks: slice, pairs: int) -> torch.Tensor:
        """The rows of consecutive blocks' pairs, block after block, int32 [pairs]."""
        first = blocks.start // 8
        part = self.bits[first : -(-blocks.stop // 8)]
        shifts = torch.arange(8, dtype=torch.uint8, device=part.device)
        flags = ((part[:, None] >> shifts[:, None]) & 1).flatten(0, 1)
        flags = flags[blocks.start - 8 * first : blocks.stop - 8 * first]
        return torch.nonzero_static(flags, size=pairs)[:, 1].int()

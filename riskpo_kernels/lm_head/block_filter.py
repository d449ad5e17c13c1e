"""Which vocabulary blocks of which rows get a gradient, and which way each row goes for it.

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

`find_ways` learns from the device, in the backward's one host synchronisation, what the shapes of
the backward's products hang on: the number of rows with a coefficient, of those that go the sparse
way, and of the pairs of each block.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from riskpo_kernels.core.matmul import spans
from riskpo_kernels.core.softmax import BLOCK, LogitMap, RowStats

CAP = 32.0  # thresholds of mass that a row may lose in all
HALVINGS = 6
DEFAULT_EPS = {torch.bfloat16: 2.0**-14, torch.float16: 2.0**-18}  # 0 elsewhere: exact
# Above this share of active pairs the dense pass is taken. CPU: at 0.71 gathered rows were measured
# as fast as dense tiles. CUDA: a guess until it is measured.
DENSE_SHARE = {"cuda": 0.4, "cpu": 0.8}


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


def block_groups(
    counts: list[int], n: int, rows: int, bytes_per_pair: int, budget: int, block_bytes: int = 0
) -> list[slice]:
    """Consecutive blocks whose lists (n bytes a block to make them), dz and block_bytes of each fit
    in the budget."""
    groups, first, used = [], 0, 0
    for block, count in enumerate(counts):
        need = block_bytes + 2 * n + -(-count // rows) * rows * bytes_per_pair
        if used and used + need > budget:
            groups.append(slice(first, block))
            first, used = block, 0
        used += need
    return [*groups, slice(first, len(counts))]


class Sparse(NamedTuple):
    """Rows (index among the kept ones) whose active pairs are computed, and how many pairs each
    vocabulary block has; None where the host does not know."""

    rows: torch.Tensor
    counts: list[int] | None


class Ways(NamedTuple):
    """keep: rows with a coefficient, None for all of them. dense: index among the kept rows, None
    for none. sparse: pieces of at most the rows asked for."""

    keep: torch.Tensor | None
    dense: torch.Tensor | None
    sparse: list[Sparse]

    def whole(self) -> Ways:
        """The sparse rows in one piece."""
        if len(self.sparse) < 2:
            return self
        rows = torch.cat([piece.rows for piece in self.sparse])
        known = [piece.counts for piece in self.sparse if piece.counts is not None]
        counts = [sum(each) for each in zip(*known, strict=True)] if known else None
        return self._replace(sparse=[Sparse(rows, counts)])


def unasked_ways(n: int, dense: bool, piece: int, device: torch.device) -> Ways:
    """All n rows go one way; nothing is learned from the device."""
    rows = torch.arange(n, device=device)
    if dense:
        return Ways(None, rows if n else None, [])
    return Ways(None, None, [Sparse(part, None) for part in rows.split(piece)] if n else [])


def find_ways(sent: torch.Tensor, active: ActiveBlocks | None, vocab: int, piece: int) -> Ways:
    """sent: bool [n], rows with a coefficient; piece: most rows of a sparse piece."""
    n = sent.numel()
    parts = [] if active is None else list(spans(n, piece))
    numbers = [sent.sum()[None]]
    thin = sent
    if active is not None:
        thin = sent & ~active.dense
        for s in parts:
            numbers += [thin[s].sum()[None], active.of(s).among(thin[s]).counts(vocab)]
    n_sent, *rest = torch.cat(numbers).tolist()
    keep = None if n_sent == n else torch.nonzero_static(sent, size=n_sent)[:, 0]
    if active is None:
        everything = torch.arange(n_sent, device=sent.device)
        return Ways(keep, everything if n_sent else None, [])
    blocks = len(rest) // max(len(parts), 1) - 1
    sizes = rest[:: blocks + 1]
    if keep is not None:
        thin = thin[keep]
    n_thin = sum(sizes)
    dense = torch.nonzero_static(~thin, size=n_sent - n_thin)[:, 0] if n_sent > n_thin else None
    sparse = []
    # pieces are consecutive rows, so the index of all of them is cut in order
    for i, rows in enumerate(torch.nonzero_static(thin, size=n_thin)[:, 0].split(sizes)):
        if sizes[i]:
            sparse.append(Sparse(rows, rest[i * (blocks + 1) + 1 : (i + 1) * (blocks + 1)]))
    return Ways(keep, dense, sparse)

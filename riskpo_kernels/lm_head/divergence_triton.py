"""lm_head/divergence_stats.py's arithmetic on tiles of two heads, by kernels/divergence_tiles.py.

A kernel reads both tiles once. It leaves numbers of blocks, 1/128 of a tile; the row's own follow
from these when all tiles are through. With a the side that weighs, b the other one, m_b and m the
peaks of a block and of the row, near = m_b,a - m_b,b and d0 = m_a - m_b,

    s = sum s_b e^(m_b - m)      u = sum over a's e^(m_b - m) (u_b + s_b (near - d0))

and A_b counts from the block's own near.
"""

from __future__ import annotations

from typing import Any

import torch

from riskpo_kernels.core.softmax import BLOCK
from riskpo_kernels.kernels import divergence_tiles
from riskpo_kernels.lm_head import divergence_stats
from riskpo_kernels.lm_head.block_filter import n_blocks
from riskpo_kernels.lm_head.divergence_stats import Room, Side, Stats

NUMBERS = {"forward_kl": 5, "reverse_kl": 6, "jsd": 4}  # of a block


class Fold(divergence_stats.Fold):
    """The statistics of rows. Until all tiles are through they are those of blocks."""

    def __init__(
        self, n: int, vocab: int, like: torch.Tensor, wide: torch.dtype, kind: str, bounded: bool
    ):
        super().__init__(n, vocab, like, wide, kind, bounded=False)
        # a kernel writes a block's rows side by side
        self.found = like.new_empty(NUMBERS[kind], n_blocks(vocab), n, dtype=wide)

    def tile(self, v: slice, sides: tuple[Side, Side], room: Room) -> None:
        """Both sides."""
        p, q = (x.tile for x in sides)
        divergence_tiles.statistics(self.kind, p, q, self.found, v.start // BLOCK)

    def close(self) -> None:
        """Makes the rows' statistics of the blocks'."""
        if not self.found.shape[1]:
            return
        (top, s), own = (self.found[:2], self.found[2:4]), self.own
        self.m = top.amax(1)
        self.d0 = self.m[own] - self.m[1 - own]
        shrink = torch.exp(top - self.m[:, None])
        s.mul_(shrink)
        self.s = s.sum(1)
        self.blocks, self.anchors = s.transpose(1, 2), self.m[..., None]
        if self.kind == "jsd":
            return
        near = top[own] - top[1 - own]
        self.u = (s[own] * (near - self.d0)).addcmul_(self.found[4], shrink[own]).sum(0)
        if self.kind == "reverse_kl":
            far = self.found[5].mul_(shrink[0])
            self.blocks = torch.stack([self.blocks[0], far.T])
            self.anchors, self.near = self.m[[0, 0], :, None], near.T


class Mixture(divergence_stats.Mixture):
    """jsd's sums over rows. The statistics of blocks make room for its own."""

    def __init__(self, fold: Fold, stats: Stats, beta: float):
        self.beta, self.numbers, self.found = beta, torch.stack([*stats]), fold.found

    def tile(self, v: slice, sides: tuple[Side, Side], room: Room) -> None:
        """Both sides."""
        p, q = (x.tile for x in sides)
        divergence_tiles.mixture(self.beta, p, q, self.numbers, self.found, v.start // BLOCK)

    def close(self) -> None:
        """Makes the rows' sums of the blocks'."""
        self.total, self.own = self.found[:2].sum(1)
        self.far, self.p_sum = self.found[2:].transpose(1, 2)


def gradient_of(
    kind: str,
    beta: float,
    sides: tuple[Side, Side],
    numbers: torch.Tensor,
    room: Room,
    dtype: torch.dtype,
    sums: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As divergence_stats.gradient_of."""
    p, q = (x.tile for x in sides)
    dz = p.raw if dtype == p.raw.dtype else room.take("dz", dtype, *p.raw.shape)
    parts: Any = None
    if sums:
        rows = -(-p.raw.shape[0] // divergence_tiles.ROWS)
        parts = room.take("sums", p.raw.dtype, rows, p.raw.shape[1])
    divergence_tiles.gradient(kind, beta, p, q, numbers, dz, parts)
    return dz, None if parts is None else parts.sum(0)

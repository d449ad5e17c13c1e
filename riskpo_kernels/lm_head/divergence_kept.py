"""Gradients of logits that the forward of linear_divergence makes already, for its backward.

On a CPU the products that recompute both heads' logits are half of the backward. Where rows drop
blocks few of them are needed, so the forward holds the logits of a few rows whole until it knows
their statistics and their active blocks, and keeps the gradient of the active pairs (row, block of
128 columns) alone, for an upstream gradient of 1. Rows come in order; the first that do not fit,
and all after them, are recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from riskpo_kernels.core.matmul import Plan, plan_tiles
from riskpo_kernels.core.softmax import BLOCK
from riskpo_kernels.lm_head.block_filter import n_blocks
from riskpo_kernels.lm_head.divergence_pair import OP, Pair, Words
from riskpo_kernels.lm_head.divergence_stats import Stats, slope_of

TILE = {"cuda": (4096, 8192), "cpu": (1024, 1024)}  # (rows, cols) of the largest one
SHARE = 8  # memory_mib / SHARE for the rows that are held whole, and as much for what is kept
LEAST_ROWS = 32  # of a tile of whole rows: products of fewer are slow
NOWHERE = -1e30  # logit of a column beyond the vocabulary: probability 0 on both sides


class Kept(NamedTuple):
    """Pairs in the order of row tiles, block after block within one."""

    dz: torch.Tensor  # [P, 128]
    where: torch.Tensor  # int32 [2, P]: block, and row among the live ones
    used: torch.Tensor  # int64 [2]: rows and pairs that are kept

    @staticmethod
    def new(like: torch.Tensor, wide: torch.dtype, vocab: int, mib: float) -> Kept:
        """Room for what fits into mib."""
        fitting = int(mib * 2**20) // (BLOCK * wide.itemsize + 8)
        pairs = torch.sym_min(like.shape[0] * n_blocks(vocab), fitting)
        return Kept(
            torch.zeros(pairs, BLOCK, dtype=wide, device=like.device),  # untouched pages cost none
            torch.zeros(2, pairs, dtype=torch.int32, device=like.device),
            torch.zeros(2, dtype=torch.int64, device=like.device),
        )

    def save(
        self,
        r: slice,
        whole: torch.Tensor,
        keep: torch.Tensor,
        stats: Stats,
        own: torch.Tensor,
        kind: str,
        beta: float,
    ) -> bool:
        """Keep the gradients of rows r, whose active pairs are keep [R, B]; False: no room.

        whole [2, R, B * 128] are the logits of student and teacher, stats and own those rows'.
        """
        block, row = keep.T.nonzero().unbind(1)
        first, room = int(self.used[1]), self.where.shape[1]
        if first + len(block) > room:
            return False
        at = slice(first, first + len(block))
        zp, zq = (x.unflatten(1, (-1, BLOCK))[row, block] for x in whole)
        self.dz[at] = slope_of(kind, beta, zp, zq, stats, own, row)
        self.where[0, at], self.where[1, at] = block, row + r.start
        self.used[0], self.used[1] = r.stop, at.stop
        return True

    def by_block(self, sent: torch.Tensor, blocks: int) -> KeptBlocks:
        """In the order of blocks, without the rows that were sent nothing."""
        used = int(self.used[1])
        block, row = self.where[:, :used].long()
        order = block.argsort(stable=True)
        order = order[sent[row[order]]]
        counts = torch.bincount(block[order], minlength=blocks).tolist()
        return KeptBlocks(self.dz, order.split(counts), row[order].split(counts))


class KeptBlocks(NamedTuple):
    """Of each block: where its pairs lie in dz, and their rows."""

    dz: torch.Tensor
    at: tuple[torch.Tensor, ...]
    rows: tuple[torch.Tensor, ...]

    def of(self, v: slice) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(rows, their gradients [R, C], a copy) of the block with columns v; nothing: none."""
        block = v.start // BLOCK
        if self.at and len(self.at[block]):
            yield self.rows[block], self.dz[self.at[block], : v.stop - v.start]


def rows_whole(vocab: int, wide: torch.dtype, mib: float) -> int:
    """How many rows' logits of both heads fit."""
    return int(mib * 2**20) // (2 * BLOCK * max(n_blocks(vocab), 1) * wide.itemsize)


def kept_mib(w: Words, device: torch.device, vocab: int, wide: torch.dtype) -> float:
    """Of memory_mib, for the rows that are held whole, and as much for what is kept; 0: nothing is.

    A softcap has a slope beside, ranks exchange statistics first, a GPU recomputes in no time.
    """
    keeps = w.keep and w.tail_eps and not w.group and w.softcap is None and device.type == "cpu"
    mib = w.memory_mib / SHARE
    return mib if keeps and rows_whole(vocab, wide, mib) >= LEAST_ROWS else 0.0


def new_whole(like: torch.Tensor, wide: torch.dtype, vocab: int, rows: int) -> torch.Tensor:
    """[2, rows, B * 128] for logits; the columns beyond the vocabulary are there already."""
    whole = like.new_empty(2, rows, BLOCK * n_blocks(vocab), dtype=wide)
    whole[:, :, vocab:] = NOWHERE
    return whole


def plan_of(pair: Pair, w: Words, vocab: int) -> Plan:
    width = pair.student.hidden.shape[1] + pair.teacher.hidden.shape[1]
    mib = kept_mib(w, pair.student.hidden.device, vocab, pair.wide)
    rows, cols = TILE["cuda" if pair.student.hidden.is_cuda else "cpu"]
    return plan_tiles(
        OP,
        pair.student.n,
        vocab,
        width,
        memory_mib=w.memory_mib - 2 * mib,
        most_rows=rows,
        most_cols=cols,
        tile_bytes=6 * pair.wide.itemsize,
        edge_bytes=pair.wide.itemsize,
        row_bytes=6 * pair.wide.itemsize * n_blocks(vocab) if w.tail_eps else 0,
    )

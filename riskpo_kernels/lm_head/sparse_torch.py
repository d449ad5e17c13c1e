"""The backward of a head over its active (row, block) pairs: rows are gathered per block.

For every vocabulary block, the rows in which it is active: recompute their 128 logits, form the
gradient, write the block's rows of dW once, and add dz W to the gathered rows of dH. Work: 6 units
times the active share, instead of 6 units. A run of blocks that are active in nearly every row is
computed for all rows: nothing is gathered or scattered, and the products are wider.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from riskpo_kernels.core.gradient import Gradients, RowGradient, gradient
from riskpo_kernels.core.matmul import WHOLE_TILE, Head, Options, padded, products_of
from riskpo_kernels.core.softmax import BLOCK, ActiveBlocks
from riskpo_kernels.lm_head.ways import block_groups

FULL = 0.7  # of a block's rows active: then the others cost less than gathering (kernel-notes.md)
STRIP = 8  # blocks of a run that are computed at once


class _Strips:
    """The products of one call: their operands live in buffers that are made once, since fresh
    pages for every block would have to be zeroed by the system."""

    def __init__(self, head: Head, up: RowGradient, o: Options, into: Gradients):
        self.head, self.up, self.into = head, up, into
        self.products = products_of(head)
        width, wide = head.width, self.products.wide
        # a row: its hidden state (twice while it is widened), its dH, its logits
        per_row = wide.itemsize * (3 * width + STRIP * BLOCK)
        most = max(BLOCK, int(o.memory_mib * 2**20) // per_row)
        self.rows = min(most, head.n)
        self.pad = 0
        if o.deterministic:
            self.rows = self.pad = min(most, WHOLE_TILE["cpu"][0])

        def buffer(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(self.rows * columns, dtype=dtype, device=head.hidden.device)

        self.logits = buffer(STRIP * BLOCK, wide)
        self.gathered = buffer(width, head.hidden.dtype)
        self.scattered = buffer(width, wide) if into.dh is not None else None
        self.dh = None if into.dh is None else into.dh.open(slice(0, head.n))

    def hidden(self, rows: torch.Tensor | slice) -> torch.Tensor:
        head = self.head
        if isinstance(rows, slice) or head.low_rank is not None:
            return head.take(rows, self.products.dtype)
        out = self.gathered[: rows.numel() * head.hidden.shape[1]].view(rows.numel(), -1)
        at = rows if head.rows is None else head.rows[rows]
        return torch.index_select(head.hidden, 0, at, out=out).to(self.products.dtype)

    def add(self, v: slice, rows: torch.Tensor | None) -> None:
        """Columns v of the given rows, of all without."""
        products, into = self.products, self.into
        w = self.head.columns(v, products.dtype)
        dw = None if into.dw is None else into.dw.open(v)
        if rows is None:
            pieces: Iterator[torch.Tensor | slice] = iter(
                slice(i, min(i + self.rows, self.head.n)) for i in range(0, self.head.n, self.rows)
            )
        else:
            pieces = iter(rows.split(self.rows))
        for r in pieces:
            self._piece(v, r, w, dw)
        if into.dw is not None and dw is not None:
            into.dw.close(v, dw)

    def _piece(
        self, v: slice, r: torch.Tensor | slice, w: torch.Tensor, dw: torch.Tensor | None
    ) -> None:
        head, products, into = self.head, self.products, self.into
        h = padded(self.hidden(r), self.pad)
        part = self.up.of(r, self.pad)
        raw = self.logits[: h.shape[0] * w.shape[0]].view(h.shape[0], -1)
        head.logits(products, r, v, h, w, raw)
        target, bias = head.targets(r, v, self.pad), head.bias_of(v, products.wide)
        map = head.map_of(r, self.pad)
        gradient(raw, target, bias, part, map, raw)
        dz = raw.to(products.dtype)
        if self.dh is not None and self.scattered is not None:
            if isinstance(r, slice):
                products.add(self.dh[r], dz, w)
            else:
                piece = self.scattered[: h.numel()].view(h.shape)
                self.dh.index_add_(0, r, products.into(piece, dz, w)[: r.numel()])
        if dw is not None:
            products.add(dw, dz.T, head.trained(h))
        if into.db is not None:
            into.db[v] += raw.sum(0)


def sparse_backward(
    head: Head,
    up: RowGradient,
    active: ActiveBlocks,
    counts: list[int],
    o: Options,
    into: Gradients,
) -> None:
    """Add the active pairs of the rows, counts of each block, to the gradients; dH is visited again
    and again. With deterministic=True no row is computed because others are."""
    strips = _Strips(head, up, o, into)
    full = [not o.deterministic and n >= FULL * head.n for n in counts]
    # a list of pairs takes a byte per row and block, and two int64 per pair
    for blocks in block_groups(counts, head.n, 1, 20, int(o.memory_mib * 2**18)):
        lists = active.pair_rows(blocks, sum(counts[blocks])).split(counts[blocks])
        block = blocks.start
        while block < blocks.stop:
            end = block + 1
            while full[block] and end < min(blocks.stop, block + STRIP) and full[end]:
                end += 1
            v = slice(block * BLOCK, min(end * BLOCK, head.vocab))
            if counts[block]:  # else its rows of dW stay zero
                strips.add(v, None if full[block] else lists[block - blocks.start])
            block = end

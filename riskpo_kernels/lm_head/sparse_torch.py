"""The backward of a head over its active (row, block) pairs: rows are gathered per block.

For every vocabulary block, the rows in which it is active: recompute their 128 logits, form the
gradient, write the block's rows of dW once, and add dz W to the gathered rows of dH. Work: 6 units
times the active share, instead of 6 units. A run of blocks that are active in nearly every row is
computed for all rows: nothing is gathered or scattered, and the products are wider.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from riskpo_kernels.core.gradient import Gradients, RowGradient, gradient
from riskpo_kernels.core.matmul import WHOLE_TILE, Head, Options, padded, products_of
from riskpo_kernels.core.softmax import BLOCK, ActiveBlocks, LogitMap
from riskpo_kernels.lm_head.ways import block_groups

FULL = 0.7  # of a block's rows active: then the others cost less than gathering (kernel-notes.md)
STRIP = 8  # blocks of a run that are computed at once


class Sent(NamedTuple):
    """What the backward was given for each of some rows."""

    up: RowGradient
    target: torch.Tensor
    map: LogitMap

    def of(self, rows: slice | torch.Tensor, pad: int = 0) -> Sent:
        """Some of them, and rows without a gradient up to `pad`."""
        map = self.map.of(rows)
        if isinstance(map.temperature, torch.Tensor):
            map = map._replace(temperature=padded(map.temperature, pad, 1.0))
        return Sent(self.up.of(rows, pad), padded(self.target[rows], pad), map)

    def split(self, counts: list[int]) -> list[Sent]:
        """So many rows each: one call of PyTorch, for there are hundreds of blocks."""
        up, t = self.up, self.map.temperature
        each = [[x] * len(counts) if x is None else x.split(counts) for x in up]
        maps = [self.map] * len(counts)
        if isinstance(t, torch.Tensor):
            maps = [self.map._replace(temperature=x) for x in t.split(counts)]
        ups = (RowGradient(*x) for x in zip(*each, strict=True))
        return [Sent(*x) for x in zip(ups, self.target.split(counts), maps, strict=True)]


class _Strips:
    """The products of one call: their operands live in buffers that are made once, since fresh
    pages for every block would have to be zeroed by the system."""

    def __init__(self, head: Head, o: Options, into: Gradients):
        self.head, self.into = head, into
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

    def add(self, v: slice, rows: torch.Tensor | slice, sent: Sent) -> None:
        """Columns v of the given rows, and what was sent to each of them."""
        products, dw = self.products, self.into.dw
        w = self.head.columns(v, products.dtype)
        sums, new = None if dw is None else dw.open(v), dw is not None and dw.once
        count = rows.stop if isinstance(rows, slice) else rows.numel()
        for i in range(0, count, self.rows):
            r, part = rows, sent
            if count > self.rows or self.pad:
                piece = slice(i, min(i + self.rows, count))
                r, part = (
                    piece if isinstance(rows, slice) else rows[piece],
                    sent.of(piece, self.pad),
                )
            self._piece(v, r, part, w, sums, products.into if new else None)
            new = False
        if dw is not None and sums is not None:
            dw.close(v, sums)

    def _piece(
        self,
        v: slice,
        r: torch.Tensor | slice,
        sent: Sent,
        w: torch.Tensor,
        dw: torch.Tensor | None,
        write: Callable[..., object] | None,
    ) -> None:
        """write: into sums that hold anything."""
        head, products, into = self.head, self.products, self.into
        h = padded(self.hidden(r), self.pad)
        raw = self.logits[: h.shape[0] * w.shape[0]].view(h.shape[0], -1)
        head.logits(products, r, v, h, w, raw)
        bias = head.bias_of(v, products.wide)
        gradient(raw, sent.target - v.start, bias, sent.up, sent.map, raw)
        dz = raw.to(products.dtype)
        if self.dh is not None and self.scattered is not None:
            if isinstance(r, slice):
                products.add(self.dh[r], dz, w)
            else:
                piece = self.scattered[: h.numel()].view(h.shape)
                self.dh.index_add_(0, r, products.into(piece, dz, w)[: r.numel()])
        if dw is not None:
            (write or products.add)(dw, dz.T, head.trained(h))
        if into.db is not None:
            into.db[head.ids(v)] += raw.sum(0)


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
    strips, everyone = _Strips(head, o, into), Sent(up, head.target, head.map)
    full = [not o.deterministic and n >= FULL * head.n for n in counts]
    # a list of pairs takes a byte per row and block; of a pair two int64 and what was sent
    for blocks in block_groups(counts, head.n, 1, 60, int(o.memory_mib * 2**18)):
        here = counts[blocks]
        rows = active.pair_rows(blocks, sum(here))
        sent, lists = everyone.of(rows).split(here), rows.split(here)
        block = blocks.start
        while block < blocks.stop:
            end, i = block + 1, block - blocks.start
            while full[block] and end < min(blocks.stop, block + STRIP) and full[end]:
                end += 1
            v = slice(block * BLOCK, min(end * BLOCK, head.vocab))
            if full[block]:
                strips.add(v, slice(0, head.n), everyone)
            elif counts[block]:
                strips.add(v, lists[i], sent[i])
            elif into.dw is not None:
                into.dw.skip(v)
            block = end

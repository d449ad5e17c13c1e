"""Rows of the head that are gathered for each token: a few columns of its logits, and back.

Tokens and how many columns each wants lie in a list like CSR: row i has ids[starts[i] : starts[i] +
counts[i]], of this rank's columns. Rows of like counts go together, so that little is padded, and a
row that wants more than fits goes in pieces. The gathered rows [R, k, D] are the workspace.

Work: N K D multiply-adds for the logits, as many for dH and for dW, all of them bound by memory:
three passes over N K D numbers forward, six backward. No pass over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from riskpo_kernels.core.matmul import Head, executed, products_of, spans
from riskpo_kernels.core.process_groups import group_called, sum_over
from riskpo_kernels.core.softmax import LogitMap, mapped

CPU_PAIRS = 2**18  # numbers of a piece that stay in a CPU's cache
Sums = list[torch.Tensor | None]  # dH [n, D], dW [V, D], dbias [V], float32 or wider
SAME = LogitMap(1.0, None, 1.0)  # of logits that are z already


@dataclass(frozen=True)
class Lists:
    """ids [P] of the head's rows; starts, counts [n] of each token."""

    ids: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor

    @staticmethod
    def square(ids: torch.Tensor) -> Lists:
        """[n, K] ids; one below 0 has no logit."""
        n, k = ids.shape
        starts = torch.arange(n, device=ids.device) * k
        return Lists(ids.reshape(-1), starts, torch.full_like(starts, k))

    def of(self, keep: torch.Tensor | None) -> Lists:
        """Those of some of the tokens."""
        if keep is None:
            return self
        return Lists(self.ids, self.starts[keep], self.counts[keep])

    def within(self, first: int, columns: int) -> Lists:
        """Those among `columns` columns from id `first` on, counted from there."""
        local = self.ids - first
        mine = (local >= 0) & (local < columns)
        before = torch.nn.functional.pad(mine.cumsum(0), (1, 0))
        starts = before[self.starts]
        return Lists(local[mine], starts, before[self.starts + self.counts] - starts)

    def take(self, rows: torch.Tensor, columns: slice) -> torch.Tensor:
        """ids [R, columns] of some of the rows, -1 beyond what a row has."""
        at = torch.arange(columns.start, columns.stop, device=self.ids.device)
        beyond = at >= self.counts[rows][:, None]
        at = (self.starts[rows][:, None] + at).masked_fill_(beyond, 0)
        return self.ids[at].masked_fill_(beyond, -1)


@dataclass(frozen=True)
class Piece:
    """Some columns of some rows' lists: z [R, k], -inf where there is none, and what it is of."""

    rows: torch.Tensor
    columns: slice
    ids: torch.Tensor
    z: torch.Tensor
    slope: torch.Tensor | None
    h: torch.Tensor
    w: torch.Tensor

    def send(self, dz: torch.Tensor, sums: Sums, *, deterministic: bool) -> None:
        """Add what the gradient dz [R, k] of z / softcap'(z) makes (overwritten, as are the
        gathered rows)."""
        dh, dw, db = sums
        if self.slope is not None:
            dz.mul_(self.slope)
        absent = self.ids < 0
        dz.masked_fill_(absent, 0.0)
        at = self.ids.masked_fill(absent, 0).reshape(-1)
        if dh is not None:
            executed(*self.w.shape)
            dh.index_add_(0, self.rows, torch.bmm(dz[:, None], self.w)[:, 0])
        if dw is not None:
            executed(*self.w.shape)
            torch.mul(dz[..., None], self.h[:, None], out=self.w)
            _add_at(dw, at, self.w.flatten(0, 1), deterministic)
        if db is not None:
            _add_at(db, at, dz.reshape(-1), deterministic)


def _add_at(
    into: torch.Tensor, at: torch.Tensor, values: torch.Tensor, deterministic: bool
) -> None:
    if deterministic and into.is_cuda:  # sorts; index_add_ adds in the order of arrival
        into.index_put_((at,), values, accumulate=True)
    else:
        into.index_add_(0, at, values)


def pieces(head: Head, lists: Lists, memory_mib: float) -> Iterator[Piece]:
    """Every list once. One host synchronisation, before the first piece."""
    products = products_of(head)
    width = head.hidden.shape[1]
    most = int(memory_mib * 2**20) // (3 * products.wide.itemsize)
    if head.hidden.device.type == "cpu":
        most = min(most, CPU_PAIRS)
    most = max(1, most // max(width, 1))  # pairs of a piece
    if not head.vocab:  # an empty shard
        return
    counts, order = lists.counts.sort()
    lengths = counts.tolist()
    start = next((i for i, count in enumerate(lengths) if count), len(lengths))
    while start < len(lengths):
        stop = start + 1
        while stop < len(lengths) and (stop + 1 - start) * lengths[stop] <= most:
            if lengths[stop] > 2 * lengths[start] + 8:  # too much of it would be padding
                break
            stop += 1
        for columns in spans(lengths[stop - 1], most):
            yield _piece(head, lists, order[start:stop], columns)
        start = stop


def _piece(head: Head, lists: Lists, rows: torch.Tensor, columns: slice) -> Piece:
    wide = products_of(head).wide
    ids = lists.take(rows, columns)
    absent = ids < 0
    at = ids.masked_fill(absent, 0)
    h, w = head.take(rows, wide), head.weight[at].to(wide)
    executed(*w.shape)
    raw = (w * h[:, None]).sum(2)  # a product of a matrix and a vector has 4 times the error
    bias = None if head.bias is None else head.bias[at].to(wide)
    z, slope = mapped(raw, bias, head.map_of(rows), slope=True)
    return Piece(rows, columns, ids, z.masked_fill_(absent, -torch.inf), slope, h, w)


def new_sums(head: Head, needs: Sequence[bool]) -> Sums:
    """Zeros where a gradient is needed."""
    wide, (vocab, width) = products_of(head).wide, head.weight.shape
    sizes = ((head.n, width), (vocab, width), (vocab,))
    return [
        head.hidden.new_zeros(size, dtype=wide) if need else None
        for size, need in zip(sizes, needs, strict=True)
    ]


def finish_sums(head: Head, sums: Sums, group: str) -> tuple[torch.Tensor | None, ...]:
    """The gradients of all rows, summed over ranks, rounded once."""
    dh, dw, db = sums
    if dh is not None:
        dh = (sum_over(group_called(group), dh) if group else dh).to(head.hidden.dtype)
        if head.rows is not None:
            dh = torch.zeros_like(head.hidden).index_copy(0, head.rows, dh)
    return (
        dh,
        None if dw is None else dw.to(head.weight.dtype),
        None if db is None or head.bias is None else db.to(head.bias.dtype),
    )

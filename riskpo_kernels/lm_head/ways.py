"""Which way each row goes in the backward: every column of it, or its active blocks only.

`find_ways` learns from the device, in the backward's one host synchronisation, what the shapes of
the backward's products hang on: the number of rows with a coefficient, of those that go the sparse
way, and of the pairs of each block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from riskpo_kernels.core.matmul import spans
from riskpo_kernels.core.softmax import ActiveBlocks


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

"""Which rows go which way in the backward, learned from the device in one transfer.

The number of rows with a coefficient, of those that go the sparse way, and of the pairs of each
vocabulary block are the shapes of the backward's products, so the host must know them. This is the
backward's one host synchronisation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from riskpo_kernels.core.matmul import spans
from riskpo_kernels.lm_head.block_filter import ActiveBlocks


class Sparse(NamedTuple):
    """Rows (index among the kept ones) whose active pairs are computed, and how many pairs each
    vocabulary block has."""

    rows: torch.Tensor
    counts: list[int]


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
        counts = [sum(each) for each in zip(*(p.counts for p in self.sparse), strict=True)]
        return self._replace(sparse=[Sparse(rows, counts)])


def find_ways(sent: torch.Tensor, active: ActiveBlocks | None, vocab: int, piece: int) -> Ways:
    """sent: bool [n], rows with a coefficient; piece: most rows of a sparse piece."""
    n = sent.numel()
    parts = [] if active is None else list(spans(n, piece))
    numbers = [sent.sum()[None]]
    thin = sent
    if active is not None:
        thin = sent & ~active.dense
        for s in parts:
            numbers += [thin[s].sum()[None], active.counts(vocab, thin, s)]
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

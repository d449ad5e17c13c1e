"""Logits that the forward keeps for the backward, which then need no second product.

A small head's logits fit in a small part of the workspace, whole or in part: those of the first
columns are kept, raw, in float32 (float64). Only the torch backend on a CPU does so: there the
product is the cost. On a GPU this little is recomputed in microseconds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from riskpo_kernels.core.rows import BLOCK

SHARE = 20  # at most memory_mib / SHARE stays allocated between the forward and the backward


def kept_columns(rows: int, vocab: int, itemsize: int, memory_mib: float) -> int:
    """How many columns' logits are kept; whole blocks, or all columns."""
    fitting = int(memory_mib * 2**20 / SHARE) // (itemsize * torch.sym_max(rows, 1))
    return torch.sym_min(vocab, fitting // BLOCK * BLOCK)


class KeptLogits(NamedTuple):
    """Raw logits [N, K] of the first K columns; row i is row i of the hidden states."""

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

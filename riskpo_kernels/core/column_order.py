"""The order of a head's columns, in which rows are active in fewer blocks of 128 of them.

Ids have nothing to do with it: a flat row is active in many blocks for a few words each. Columns
that the same rows give mass may stand together wherever their ids are. Only the PyTorch backend on
a CPU does so: a GPU's kernels would need a copy of the whole head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from riskpo_kernels.core.softmax import BLOCK

# The order hangs on so many rows' probabilities; the first few say whether it pays. To copy the
# head so that its blocks follow the order costs as much as so many rows of a block, measured.
PROBES, FIRST_PROBES, PAYS = 32, 8, 150
HEAD_OF_ORDER = 2048  # columns of the first tier


class ColumnOrder:
    """ids [V] (int64): which of the vocabulary each column is."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids
        self._room: torch.Tensor | None = None

    def take(self, weight: torch.Tensor, v: slice) -> torch.Tensor:
        """Rows of the head; they stand where the next call writes, for fresh pages are slow."""
        ids = self.ids[v]
        size = ids.numel() * weight.shape[1]
        if self._room is None or self._room.numel() < size:
            self._room = weight.new_empty(size)
        out = self._room[:size].view(-1, weight.shape[1])
        return torch.index_select(weight, 0, ids, out=out)

    def places(self, target: torch.Tensor) -> torch.Tensor:
        """Which column each target [N] is; one that is no word stays what it is."""
        place = torch.empty_like(self.ids)
        place[self.ids] = torch.arange(len(place), device=place.device)
        within = (target >= 0) & (target < len(place))
        return torch.where(within, place[target.clamp(0, len(place) - 1)], target)


def find_order(
    probabilities: Callable[[torch.Tensor], torch.Tensor], n: int, eps: float
) -> torch.Tensor | None:
    """The columns' order for n rows, int64 [V], if it pays; by probabilities [V, R] of a few."""
    if n <= PAYS:  # then it does not
        return None
    spread = torch.linspace(0, n - 1, PROBES).long()
    spread = spread.view(FIRST_PROBES, -1).T.flatten()  # the first ones are spread out as well
    first = probabilities(spread[:FIRST_PROBES])
    if not pays(first, n, eps):
        return None
    return common_order(torch.cat((first, probabilities(spread[FIRST_PROBES:])), 1))


def pays(p: torch.Tensor, n: int, eps: float) -> bool:
    """Whether n rows of which some have probabilities p [V, R] are active in so many blocks that
    another order of the columns saves more than it costs."""
    whole = p[: len(p) // BLOCK * BLOCK].unflatten(0, (-1, BLOCK)).sum(1)
    return float((whole > eps).float().mean()) * n > PAYS


def common_order(p: torch.Tensor) -> torch.Tensor:
    """The columns, int64 [V], by probabilities p [V, R] of some rows (overwritten): in tiers of
    falling mass, each sqrt(2) as wide as those before it, and inside by the row that gives a column
    most, since rows come from a few contexts. On SmolLM2's samples at temperature 1 it leaves 0.155
    of the pairs active where 0.36 are by id (docs/kernel-notes.md)."""
    heaviest = p.argmax(1)
    by_mass = p.sqrt_().sum(1).argsort(descending=True)
    rank = torch.empty_like(by_mass)
    rank[by_mass] = torch.arange(len(rank), device=p.device)
    tier = (2 * torch.log2((rank + HEAD_OF_ORDER).float())).long()
    return (tier * p.shape[1] + heaviest).argsort(stable=True)

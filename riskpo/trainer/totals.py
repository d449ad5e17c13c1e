"""Sums of a step's statistics over its micro-batches and over the processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from riskpo.distributed import Ranks

# statistic of the loss -> what it is a mean over. A "unit" has one ratio: a token or a sequence.
MEAN_OVER = {
    "clip_fraction": "units",
    "clip_low_fraction": "units",
    "clip_high_fraction": "units",
    "ratio_mean": "units",
    "zero_coefficient_fraction": "tokens",
    "entropy": "tokens",
    "divergence": "tokens",  # with a teacher
    "loss": "steps",  # of the optimiser
    "grad_norm": "steps",
}


class Totals:
    """Sums and maxima by name, 0 at first."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.largest: dict[str, float] = defaultdict(float)

    def add(self, sums: Mapping[str, float], largest: Mapping[str, float]) -> None:
        for name, value in sums.items():
            self.sums[name] += value
        for name, value in largest.items():
            self.largest[name] = max(self.largest[name], value)

    def gather(self, ranks: Ranks) -> None:
        """Add the totals of the other processes; all ranks have to call."""
        for rank, other in enumerate(ranks.gather(self)):
            if rank != ranks.rank:
                self.add(other.sums, other.largest)

    def mean(self, name: str, over: str) -> float:
        return self.sums[name] / max(self.sums[over], 1.0)


def count_loss(totals: Totals, stats: dict[str, torch.Tensor], sequences: int, ratio: str) -> None:
    """Add the stats of clipped_surrogate for one micro-batch of `sequences`."""
    tokens = float(stats["tokens"])
    counts = {"tokens": tokens, "units": tokens if ratio == "token" else float(sequences)}
    sums = {n: counts[over] * float(stats[n]) for n, over in MEAN_OVER.items() if n in stats}
    totals.add(counts | sums, {"ratio_max": float(stats["ratio_max"])})


def loss_numbers(totals: Totals) -> dict[str, float]:
    """The loss's numbers for the log."""
    means = {n: totals.mean(n, over) for n, over in MEAN_OVER.items() if n in totals.sums}
    return means | {"ratio_max": totals.largest["ratio_max"], "tokens": totals.sums["tokens"]}

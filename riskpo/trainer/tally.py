"""An update's numbers, added up over its micro-batches and the processes."""

from __future__ import annotations

import torch

from riskpo.distributed import Ranks
from riskpo.trainer.rollout_correction import MismatchSums


class Tally:
    """Sums of a step's numbers, weighted by tokens or by what a ratio belongs to."""

    MEANS_OF_UNITS = ("clip_fraction", "clip_low_fraction", "clip_high_fraction", "ratio_mean")

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.units = self.tokens = self.missing = 0.0
        self.ratio_max = 0.0
        self.steps: list[tuple[float, float]] = []
        self.mismatch: MismatchSums | None = None

    def add(self, stats: dict[str, torch.Tensor], sequences: int | None, missing: int) -> None:
        """A micro-batch's stats; `sequences` where each sequence has one ratio; `missing` tokens
        without a log-prob of the sampler, which are not in "kl"."""
        tokens = float(stats["tokens"])
        units = tokens if sequences is None else sequences
        self.units += units
        self.tokens += tokens
        self.missing += missing
        for name in (*self.MEANS_OF_UNITS, "zero_coefficient_fraction", "entropy", "kl"):
            weight = units if name in self.MEANS_OF_UNITS else tokens
            weight -= missing if name == "kl" else 0
            self.sums[name] = self.sums.get(name, 0.0) + weight * float(stats[name])
        self.ratio_max = max(self.ratio_max, float(stats["ratio_max"]))

    def step(self, loss: float, norm: float) -> None:
        self.steps.append((loss, norm))

    def gather(self, ranks: Ranks) -> None:
        """Add up what all ranks counted; the steps are the same on all."""
        others = [other for i, other in enumerate(ranks.gather(self)) if i != ranks.rank]
        for other in others:
            self.units += other.units
            self.tokens += other.tokens
            self.missing += other.missing
            for name, value in other.sums.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.ratio_max = max(self.ratio_max, other.ratio_max)
            if self.mismatch is not None and other.mismatch is not None:
                self.mismatch.add(other.mismatch)

    def numbers(self, correction: str) -> dict[str, float]:
        """The step's loss and gradient norm are means over its updates."""
        counts = dict.fromkeys(self.MEANS_OF_UNITS, self.units) | {"kl": self.tokens - self.missing}
        means = {
            name: value / max(counts.get(name, self.tokens), 1.0)
            for name, value in self.sums.items()
        }
        loss, norm = (sum(x) / len(self.steps) for x in zip(*self.steps, strict=True))
        mismatch = {} if self.mismatch is None else self.mismatch.numbers(correction)
        return means | {
            "sampler_kl": means.pop("kl"),
            "sampler_missing": self.missing,
            "loss": loss,
            "grad_norm": norm,
            "ratio_max": self.ratio_max,
            "tokens": self.tokens,
            **mismatch,
        }

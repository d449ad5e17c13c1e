"""A finding of `riskpo explain`, the log that it is read from, and what counts as a change."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from riskpo.config import TrainConfig
from riskpo.metrics.intervals import t_points

SURE = 1.5  # half-widths of a 95 % interval: about 3 standard errors, once in some 300 looks
FEWEST = 3  # steps at either end without which there is no noise to speak of

Record = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One sentence; `notable` where something should be looked at. `explain` sets the topic."""

    text: str
    notable: bool = False
    topic: str = ""


@dataclass(frozen=True)
class Change:
    """The means of a number over two groups of steps, and by how much noise can make them differ.

    noise is SURE half-widths of the 95 % interval of the difference, from the spread over the
    steps of each group (Welch; the smaller group's degrees of freedom). Steps count as independent,
    and a trend within a group as spread.
    """

    early: float
    late: float
    noise: float

    @property
    def moved(self) -> bool:
        return abs(self.late - self.early) > self.noise


def change(early: Sequence[float], late: Sequence[float]) -> Change | None:
    """None where a group has fewer than FEWEST values."""
    fewer = min(len(early), len(late))
    if fewer < FEWEST:
        return None
    error = math.hypot(*(statistics.stdev(x) / math.sqrt(len(x)) for x in (early, late)))
    means = statistics.fmean(early), statistics.fmean(late)
    return Change(*means, SURE * t_points(fewer) * error)


@dataclass(frozen=True)
class Log:
    """The records of a run and its settings."""

    steps: list[Record]
    evals: list[Record]
    config: TrainConfig

    @cached_property
    def fifth(self) -> int:
        return max(len(self.steps) // 5, 1)

    def early(self, name: str) -> float | None:
        return mean_of(self.steps[: self.fifth], name)

    def late(self, name: str) -> float | None:
        return mean_of(self.steps[-self.fifth :], name)

    def change(self, name: str) -> Change | None:
        """Early against late; None where there are too few of either."""
        ends = self.steps[: self.fifth], self.steps[-self.fifth :]
        return change(*([r[name] for r in end if name in r] for end in ends))

    def mean(self, name: str) -> float | None:
        return mean_of(self.steps, name)

    def total(self, name: str) -> float:
        return sum(r.get(name, 0.0) for r in self.steps)


def mean_of(records: Iterable[Record], name: str) -> float | None:
    values = [r[name] for r in records if name in r]
    return statistics.fmean(values) if values else None

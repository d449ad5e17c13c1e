"""A finding of `riskpo explain`, and the log that it is read from."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from riskpo.config import TrainConfig


@dataclass(frozen=True)
class Finding:
    """One sentence; `notable` where something should be looked at."""

    topic: str
    text: str
    notable: bool = False


@dataclass(frozen=True)
class Log:
    """The records of a run and its settings."""

    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    config: TrainConfig

    @cached_property
    def tenth(self) -> int:
        return max(len(self.steps) // 10, 1)

    def early(self, name: str) -> float | None:
        return mean_of(self.steps[: self.tenth], name)

    def late(self, name: str) -> float | None:
        return mean_of(self.steps[-self.tenth :], name)

    def mean(self, name: str) -> float | None:
        return mean_of(self.steps, name)

    def total(self, name: str) -> float:
        return sum(r.get(name, 0.0) for r in self.steps)


def mean_of(records: Iterable[dict[str, Any]], name: str) -> float | None:
    values = [r[name] for r in records if name in r]
    return statistics.fmean(values) if values else None

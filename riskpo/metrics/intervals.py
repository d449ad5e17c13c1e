"""Intervals of a mean: Student's for few seeds, Wilson's for shares near 0 or 1.

By hand: a table of 30 numbers and one formula do not justify scipy as a dependency.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom; more than 30 take the last one.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """Mean of n values with its 95 % interval; low = high = value for a single one."""

    value: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.n > 1 and (self.low > 0 or self.high < 0)


def t_points(n: int) -> float:
    """How many standard errors half of the 95 % interval of n values is."""
    return T_975[min(n - 1, len(T_975)) - 1]


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t-interval of at least one value."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        return Interval(mean, mean, mean, n)
    half = t_points(n) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


Z_975 = 1.959964  # of the normal distribution
FEW = 5.0  # questions' worth of right, or wrong, below which a bootstrap sees too little


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n; for means of values in [0, 1] it is a wide one."""
    z2 = Z_975**2 / n
    centre = (share + z2 / 2) / (1 + z2)
    half = Z_975 * math.sqrt(max(share * (1 - share), 0.0) / n + z2 / (4 * n)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def near_the_ends(
    mean: float, low: float, high: float, values: Sequence[float]
) -> tuple[float, float]:
    """[low, high], widened to Wilson's interval where few of the values are right, or wrong.

    Values beyond [0, 1] are no shares and keep their interval.
    """
    n = len(values)
    if not all(0.0 <= v <= 1.0 for v in values) or min(mean, 1 - mean) * n >= FEW:
        return low, high
    least, most = wilson(mean, n)
    return min(low, least), max(high, most)

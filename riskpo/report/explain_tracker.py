"""Do the tracked quantiles keep up with the scores? A part of `riskpo explain`.

The tracker moves q by step * (level - share of scores < q), so that its own trace tells which share
of each batch lay below it, at any level and bundle size: level - (q_next - q) / step. A tracker
that keeps up has that share at its level on average, between the scores' atoms too.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from riskpo.algorithms import find_strategy
from riskpo.metrics.covariance import ALPHA, BETA, BUNDLE
from riskpo.metrics.intervals import t_interval
from riskpo.report.findings import FEWEST, SURE, Finding, Log, Record
from riskpo_kernels import RiskPOAdvantage

LAGGING = 0.1  # share of the scores on the wrong side of a tracked quantile
BELOW = "share_below_"  # in front of a quantile's name, among the numbers of `with_shares`
LOGGED = {"q_alpha": ALPHA, "q_beta": BETA}  # levels of every run's batch_q_*


def risk_settings(log: Log) -> Any:
    """The RiskPOSettings that the run worked with, its preset's included; None without bundles."""
    advantage = find_strategy(log.config.algorithm).advantage(log.config)
    return advantage.settings if isinstance(advantage, RiskPOAdvantage) else None


def levels(settings: Any) -> dict[str, float]:
    return {"q_alpha": settings.alpha, "q_beta": settings.beta}


def with_shares(log: Log) -> list[Record]:
    """The steps that moved the tracker, each with the shares of its scores below the quantiles.

    The first step only initialises the tracker, and the last step's update is not logged. While the
    two quantiles coincide, the log has the lower one twice and the upper is unknown.
    """
    settings = risk_settings(log)
    kept = [r for r in log.steps if "q_alpha_tracked" in r] if settings else []
    found = []
    for now, after in list(pairwise(kept))[1:]:
        one = any(r["q_alpha_tracked"] == r["q_beta_tracked"] for r in (now, after))
        shares = {
            BELOW + name: level
            - (after[f"{name}_tracked"] - now[f"{name}_tracked"]) / settings.tracker_step
            for name, level in levels(settings).items()
            if not (one and name == "q_beta")
        }
        found.append(now | shares)
    return found


def tracker(log: Log) -> Iterable[Finding]:
    """Each level's lag, the two beside each other, and whether they have become one."""
    settings, late = risk_settings(log), with_shares(log)[-log.fifth :]
    if settings is None or len(late) < FEWEST:
        return
    if settings.quantiles == "bundle":
        text = f"{log.config.algorithm} only watches it: each bundle works with its own quantiles."
        yield Finding(text)
    gap = statistics.fmean(r["q_beta_tracked"] - r["q_alpha_tracked"] for r in late)
    if gap < settings.tracker_step:
        yield Finding(
            f"The levels {settings.alpha:g} and {settings.beta:g} coincide: the late quantiles are "
            f"{gap:.2f} apart on average, less than a step of the tracker "
            f"({settings.tracker_step:g}). Most scores are nearly one number, and the advantage "
            "has no middle to climb.",
            True,
        )
    shares: dict[str, float] = {}
    lags: dict[str, bool] = {}
    for name, level in levels(settings).items():
        values = [r[BELOW + name] for r in late if BELOW + name in r]
        if len(values) < len(late):  # those at hand would be a choice among the steps
            continue
        interval = t_interval(values)
        noise = SURE * (interval.high - interval.value)
        shares[name] = interval.value
        lags[name] = abs(interval.value - level) > max(LAGGING, noise)
        yield Finding(_level(name, level, interval.value, lags[name], log), lags[name])
    if len(lags) == 2 and any(lags.values()):
        both = "Both lag" if all(lags.values()) else "The two differ in lag"
        band = max(shares["q_beta"] - shares["q_alpha"], 0.0)
        yield Finding(
            f"{both}: {band:.0%} of the late scores lay between them, where the levels ask for "
            f"{settings.beta - settings.alpha:.0%}. A lower learning rate gives the tracker, "
            f"which moves at most {settings.tracker_step:g} score units a step, time to follow.",
            True,
        )


def _level(name: str, level: float, share: float, lags: bool, log: Log) -> str:
    tracked = log.late(f"{name}_tracked")
    text = f"{name}: tracked {tracked:.2f}"
    # the quantiles that every run logs of its batches, where they are at this level and size
    measured = level == LOGGED[name] and risk_settings(log).bundle_size == BUNDLE
    own = log.late(f"batch_{name}") if measured else None
    text += "" if own is None else f", the late batches' own {own:.2f}"
    text += f"; {max(share, 0.0):.0%} of the late scores lay below it, its level is {level:.0%}"
    if not lags:
        return text + "."
    place, way = ("too low", "rising") if share < level else ("too high", "falling")
    return text + f": it lags, {place} and {way}."

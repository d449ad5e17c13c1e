"""Do the tracked quantiles keep up, and which counters moved? A part of `riskpo explain`.

The tracker moves q by step * (level - share of scores < q), so that its own trace tells which share
of each batch lay below it, at any level and bundle size: level - (q_next - q) / step. A tracker
that keeps up has that share at its level on average, between the scores' atoms too.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

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


class Counter(NamedTuple):
    """A number of a step; `worry` where a rise is a fault by itself."""

    label: str
    name: str
    unit: str = "{:.1%}"
    worry: bool = False


def with_sums(r: Record) -> Record:
    """The record with the shares of a step that it holds the parts of."""
    every = sum(n for k, n in r.items() if k.startswith("outcome_"))
    lost = {name: r.get(f"outcome_{name}") for name in ("timeout", "crash")}
    found = {f"{k}_share": n / every for k, n in lost.items() if every and n is not None}
    parts = ("all_wrong_fraction", "all_right_fraction")
    if all(name in r for name in parts):
        found["all_equal_fraction"] = sum(r[name] for name in parts)
    return r | found


def counters(log: Log) -> list[Counter]:
    """Everything that a run of this algorithm may have logged; what it has not is left out."""
    ratio = find_strategy(log.config.algorithm).loss.ratio
    unit = {"token": "tokens", "sequence": "responses"}[ratio]
    return [
        Counter("all-equal groups", "all_equal_fraction"),
        Counter("all-equal bundles", "tied_bundle_fraction"),
        Counter("responses with advantage 0", "zero_advantage_fraction"),
        Counter(f"clipped {unit} ({ratio}-level ratios)", "clip_fraction"),
        Counter("token entropy, nats", "sampled_entropy", "{:.3f}"),
        Counter("truncated responses", "truncated_fraction", worry=True),
        Counter("verifier timeouts", "timeout_share", worry=True),
        Counter("verifier exceptions", "crash_share", worry=True),
        Counter("effective sample size of the sampler's weights", "sampler_ess"),
    ]


def moved(log: Log) -> Iterable[Finding]:
    """One sentence for each counter that moved, one for all that did not."""
    if log.fifth < FEWEST:
        least = 5 * FEWEST
        yield Finding(f"Too short to tell from noise: {len(log.steps)} steps; {least} are enough.")
        return
    yield Finding(
        f"The first {log.fifth} steps against the last {log.fifth}. Noise is {SURE:g} times half "
        "of the 95 % interval of the difference of the two means, about three standard errors, "
        "from the spread over the steps, which are taken as independent."
    )
    # a tracker that catches up, or falls behind, shows in the shares below its quantiles
    settings = risk_settings(log)
    tracked = [
        Counter(f"scores below {name} (level {level:.0%})", BELOW + name)
        for name, level in (levels(settings) if settings else {}).items()
    ]
    still = []
    whole = replace(log, steps=[with_sums(r) for r in log.steps])
    below = replace(log, steps=with_shares(log))
    for counter, source in [*((c, whole) for c in counters(log)), *((c, below) for c in tracked)]:
        change = source.change(counter.name)
        if change is None:
            continue
        if not change.moved:
            still.append(counter.label)
            continue
        early, late = counter.unit.format(change.early), counter.unit.format(change.late)
        times = abs(change.late - change.early) / change.noise if change.noise else float("inf")
        text = f"{counter.label[0].upper()}{counter.label[1:]}: {early} early, {late} late"
        text += f" ({times:.1f} times the noise)." if change.noise else " (each time the same)."
        yield Finding(text, counter.worry and change.late > change.early)
    if still:
        yield Finding(f"Did not move: {', '.join(still)}.")

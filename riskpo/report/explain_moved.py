"""Which counters moved from the first fifth of a run to the last? A part of `riskpo explain`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from riskpo.algorithms import find_strategy
from riskpo.report.explain_tracker import BELOW, levels, risk_settings, with_shares
from riskpo.report.findings import FEWEST, SURE, Finding, Log, Record


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

"""Which counters moved from the first fifth of a run to the last? A part of `riskpo explain`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from riskpo.algorithms import find_strategy
from riskpo.report.explain_tracker import BELOW, levels, risk_settings, with_shares
from riskpo.report.findings import FEWEST, SURE, Finding, Log, Record

TOPIC = "Which counters moved"


@dataclass(frozen=True)
class Counter:
    """A number of a step; `worry` where a rise is a fault by itself."""

    label: str
    of: Callable[[Record], float | None]
    unit: str = "{:.1%}"
    worry: bool = False


def entry(name: str) -> Callable[[Record], float | None]:
    return lambda r: r.get(name)


def total(*names: str) -> Callable[[Record], float | None]:
    return lambda r: sum(r[n] for n in names) if all(n in r for n in names) else None


def verdict_share(name: str) -> Callable[[Record], float | None]:
    def of(r: Record) -> float | None:
        every = sum(n for k, n in r.items() if k.startswith("outcome_"))
        return r[f"outcome_{name}"] / every if every and f"outcome_{name}" in r else None

    return of


def counters(log: Log) -> list[Counter]:
    """Everything that a run of this algorithm may have logged; what it has not is left out."""
    ratio = find_strategy(log.config.algorithm).loss.ratio
    unit = {"token": "tokens", "sequence": "responses"}[ratio]
    return [
        Counter("all-equal groups", total("all_wrong_fraction", "all_right_fraction")),
        Counter("all-equal bundles", entry("tied_bundle_fraction")),
        Counter("responses with advantage 0", entry("zero_advantage_fraction")),
        Counter(f"clipped {unit} ({ratio}-level ratios)", entry("clip_fraction")),
        Counter("token entropy, nats", entry("sampled_entropy"), "{:.3f}"),
        Counter("truncated responses", entry("truncated_fraction"), worry=True),
        Counter("verifier timeouts", verdict_share("timeout"), worry=True),
        Counter("verifier exceptions", verdict_share("crash"), worry=True),
        Counter("effective sample size of the sampler's weights", entry("sampler_ess")),
    ]


def tracker_counters(log: Log) -> list[Counter]:
    """A tracker that catches up, or falls behind, shows in the shares below its quantiles."""
    settings = risk_settings(log)
    return [
        Counter(f"scores below {name} (level {level:.0%})", entry(BELOW + name))
        for name, level in (levels(settings) if settings else {}).items()
    ]


def moved(log: Log) -> Iterable[Finding]:
    """One sentence for each counter that moved, one for all that did not."""
    if log.fifth < FEWEST:
        least = 5 * FEWEST
        text = f"Too short to tell from noise: {len(log.steps)} steps; {least} are enough."
        yield Finding(TOPIC, text)
        return
    yield Finding(
        TOPIC,
        f"The first {log.fifth} steps against the last {log.fifth}. Noise is {SURE:g} times half "
        "of the 95 % interval of the difference of the two means, about three standard errors, "
        "from the spread over the steps, which are taken as independent.",
    )
    still = []
    tracked = replace(log, steps=with_shares(log))
    pairs = [(x, log) for x in counters(log)] + [(x, tracked) for x in tracker_counters(log)]
    for counter, source in pairs:
        change = source.change(counter.of)
        if change is None:
            continue
        if not change.moved:
            still.append(counter.label)
            continue
        early, late = counter.unit.format(change.early), counter.unit.format(change.late)
        times = abs(change.late - change.early) / change.noise if change.noise else float("inf")
        text = f"{counter.label[0].upper()}{counter.label[1:]}: {early} early, {late} late"
        text += f" ({times:.1f} times the noise)." if change.noise else " (each time the same)."
        yield Finding(TOPIC, text, counter.worry and change.late > change.early)
    if still:
        yield Finding(TOPIC, f"Did not move: {', '.join(still)}.")

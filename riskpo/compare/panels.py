"""What each panel of a comparison's picture draws, and the numbers it takes from the logs.

Lines are means over seeds; numbers by step are smoothed first. Bands and bars are 95 % t-intervals
over seeds of what is drawn: of the levels as they are, or of differences taken seed by seed, from
which the seeds' own levels (their warm starts) drop out. A share's interval ends at 0 and at 1. A
system is told by its colour and its marker, so that it shows where lines coincide; the style of a
line tells which number it is where a panel has several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from riskpo.compare.numbers import RunLogs
from riskpo.metrics.intervals import t_points
from riskpo.report.plots import INK, smooth

# Mostly Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = "0072b2 e69f00 d55e00 009e73 cc79a7 56b4e9 6b5b95 222222 999933 882255".split()
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
LINES = ("-", "--", ":")
MARKS = 5  # markers on a line, about
SERIES = dict[str, np.ndarray]  # system -> [seeds, n]
Draw = Callable[[Any, "Page"], None]


class Page:
    """The runs of every system as arrays [seeds, steps], and how each system looks."""

    def __init__(self, runs: dict[str, dict[int, RunLogs]], against: str) -> None:
        self.runs = runs
        self.against = against
        n = len(COLOURS)  # the second ten have other markers than the first
        self.style = {
            name: {"color": "#" + COLOURS[i % n], "marker": MARKERS[(i + i // n) % n]}
            for i, name in enumerate(runs)
        }
        first = next(iter(runs.values()))
        self.seeds, self.steps = len(first), len(next(iter(first.values())).steps)
        self.window = max(self.steps // 15, 1) // 2 * 2 + 1  # `smooth` takes as many on either side

    def logged(self, name: str) -> SERIES:
        """That number by step, nan where a step has none; systems without it are left out."""
        every = {
            system: np.array([[r.get(name, np.nan) for r in run.steps] for run in runs.values()])
            for system, runs in self.runs.items()
        }
        return {system: y for system, y in every.items() if not np.isnan(y).all()}

    def series(self, name: str) -> SERIES:
        """The same, smoothed over `window` steps."""
        return {
            system: np.stack([smoothed(row, self.window) for row in y])
            for system, y in self.logged(name).items()
        }

    def minus_against(self, series: SERIES) -> SERIES:
        """Every other system's series minus that of `against`, seed by seed."""
        if self.against not in series:
            return {}
        reference = series[self.against]
        return {s: y - reference for s, y in series.items() if s != self.against}

    def held_out(self, prefix: str, which: int) -> tuple[list[str], SERIES]:
        """What follows `prefix` in the names of an evaluation (0 first, -1 last), and the numbers.

        Only systems that were evaluated, and the names that all of those have.
        """
        records = {
            system: [run.evals[which] for run in runs.values()]
            for system, runs in self.runs.items()
            if all(run.evals for run in runs.values())
        }
        every = [r for each in records.values() for r in each]
        names = [
            n for n in (every or [{}])[0] if n.startswith(prefix) and all(n in r for r in every)
        ]
        found = {s: np.array([[r[n] for n in names] for r in each]) for s, each in records.items()}
        return [n.removeprefix(prefix) for n in names], found


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """[n] averaged over `window` steps; a nan is the number before it, nans at the start stay."""
    known = np.where(np.isnan(values), -1, np.arange(len(values)))
    last = np.maximum.accumulate(known)
    found, there = values[np.maximum(last, 0)].astype(float), last >= 0
    found[there] = smooth(found[there], window)
    return found


def half_width(y: np.ndarray) -> np.ndarray:
    """[seeds, n] -> [n]: half of the 95 % t-interval of the mean over seeds; 0 for one seed."""
    if len(y) < 2:
        return np.zeros(y.shape[1])
    return t_points(len(y)) * y.std(0, ddof=1) / np.sqrt(len(y))


# Panels ---------------------------------------------------------------------------------------


def by_step(name: str, *, band: bool = True, share: bool = False) -> Draw:
    """A number by step."""

    def draw(axis: Any, page: Page) -> None:
        series = page.series(name)
        for system, y in series.items():
            _line(axis, page, system, y.mean(0), band=half_width(y) if band else None, share=share)
        _missing(axis, page, series)

    return draw


def difference_by_step(name: str) -> Draw:
    """A number by step minus that of the system compared against, seed by seed."""

    def draw(axis: Any, page: Page) -> None:
        series = page.series(name)
        differences = page.minus_against(series)
        for system, y in differences.items():
            _line(axis, page, system, y.mean(0), band=half_width(y))
        if series and not differences:
            say(axis, "nothing to compare with")
            return
        if _missing(axis, page, series):
            _zero(axis)

    return draw


def several_by_step(names: dict[str, str]) -> Draw:
    """Up to three numbers {name in the log: label}, one line style each, means only."""

    def draw(axis: Any, page: Page) -> None:
        series: SERIES = {}
        for name, line in reversed([*zip(names, LINES, strict=False)]):  # the first on top
            series = page.series(name)
            for system, y in series.items():
                _line(axis, page, system, y.mean(0), line=line)
        for label, line in zip(names.values(), LINES, strict=False):
            axis.plot([], [], color=INK, linestyle=line, linewidth=1.3, label=label)
        if _missing(axis, page, series):
            low, high = axis.get_ylim()
            axis.set_ylim(low, high + (high - low) / 8)  # a row for the legend
            axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper center", ncols=3)

    return draw


def advantages(names: dict[str, str]) -> Draw:
    """Their extremes and mean, with the line above which a response is pushed up."""

    def draw(axis: Any, page: Page) -> None:
        several_by_step(names)(axis, page)
        if any(page.logged(name) for name in names):
            _zero(axis)

    return draw


def covariances(axis: Any, page: Page) -> None:
    """The difference over all steps as the sum of its terms; the lower one is omega cov_lower."""
    mean, averse, upper = (page.logged(n) for n in ("cov_mean", "cov_mvar", "cov_upper"))
    shown = {}
    for system in [s for s in upper if s in mean and s in averse]:
        gap = mean[system] - averse[system]
        terms = (gap, upper[system], gap - upper[system])
        shown[system] = np.stack([np.nanmean(y, axis=1) for y in terms], axis=1)
    if _missing(axis, page, shown):
        _points(axis, page, ("difference", "= upper term", "+ lower term"), shown)
        _zero(axis)
    axis.set_xlabel("mean over all steps", color=INK, fontsize=9)


def by_responses(axis: Any, page: Page) -> None:
    """Mean reward against the responses sampled for it."""
    for system, y in page.series("reward_mean").items():
        x = np.mean([run.responses() for run in page.runs[system].values()], axis=0)
        _line(axis, page, system, y.mean(0), x / 1000)
    axis.set_xlabel("responses sampled (thousands)", color=INK, fontsize=9)


def entropy_by_reward(axis: Any, page: Page) -> None:
    """Token entropy against mean reward, a large marker at the last step."""
    reward, entropy = page.series("reward_mean"), page.series("sampled_entropy")
    for system in [s for s in reward if s in entropy]:
        style, x, y = page.style[system], reward[system].mean(0), entropy[system].mean(0)
        axis.plot(x, y, color=style["color"], linewidth=0.9, alpha=0.6)
        axis.plot(x[-1:], y[-1:], **style, markersize=9, markeredgecolor="white", zorder=4)
    _missing(axis, page, entropy)
    axis.set_xlabel("mean reward (marker: last step)", color=INK, fontsize=9)


def pass_at_k(axis: Any, page: Page) -> None:
    """Held-out pass@k at the end, means only, over the mean start."""
    ks, last = page.held_out("pass@", -1)
    _, start = page.held_out("pass@", 0)
    for system, y in last.items():
        axis.plot([int(k) for k in ks], y.mean(0), **page.style[system], **MARKED)
    if _axis_of_k(axis, ks):
        mean = np.mean(list(start.values()), axis=(0, 1))
        axis.plot([int(k) for k in ks], mean, color=INK, linestyle=":", linewidth=1.5)


def pass_rise(axis: Any, page: Page) -> None:
    """Its rise since the start of the same run."""
    ks, last = page.held_out("pass@", -1)
    _, start = page.held_out("pass@", 0)
    for i, (system, y) in enumerate(last.items()):
        rise, x = y - start[system], _k_places(ks, i, len(last))
        axis.errorbar(x, rise.mean(0), half_width(rise), **page.style[system], **MARKED, **BARS)
    if _axis_of_k(axis, ks):
        _zero(axis)


def strata(axis: Any, page: Page) -> None:
    """Held-out mean reward at the end, by stratum of the data."""
    names, last = page.held_out("reward_", -1)
    if names:
        _points(axis, page, names, last)
    else:
        say(axis, "no strata" if last else "no held-out questions")
    axis.set_xlabel("stratum", color=INK, fontsize=9)


def gradient_norm(axis: Any, page: Page) -> None:
    """Before it is shortened, and the length that it is shortened to."""
    by_step("grad_norm", band=False)(axis, page)
    bounds = {run.max_grad_norm for runs in page.runs.values() for run in runs.values()}
    for bound in sorted(x for x in bounds if x is not None):
        axis.axhline(bound, color=INK, linestyle=":", linewidth=1.2)


# How they draw --------------------------------------------------------------------------------

MARKED = {"markersize": 4, "linewidth": 1.1}
BARS = {"elinewidth": 0.8, "capsize": 0}


def _line(
    axis: Any,
    page: Page,
    system: str,
    y: np.ndarray,
    x: np.ndarray | None = None,
    *,
    line: str = "-",
    band: np.ndarray | None = None,
    share: bool = False,
) -> None:
    """One system's line [n], its markers above all lines and not where another system has its."""
    style, x = page.style[system], np.arange(1, len(y) + 1) if x is None else x
    axis.plot(x, y, color=style["color"], linestyle=line, linewidth=1.3)
    place = (list(page.runs).index(system) + 0.5) / len(page.runs)
    every = max(len(y) // MARKS, 1)
    axis.plot(x, y, **style, linestyle="", markersize=5, markeredgewidth=0, zorder=3,
              markevery=(min(int(place * every), len(y) - 1), every))  # fmt: skip
    if band is not None and band.any():
        low, high = y - band, y + band
        if share:
            low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
        axis.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _points(axis: Any, page: Page, names: Sequence[str], shown: SERIES) -> None:
    """Means of [seeds, n] side by side over n names, each with its interval."""
    for i, (system, y) in enumerate(shown.items()):
        x = np.arange(len(names)) + _aside(i, len(shown), 0.7)
        axis.errorbar(x, y.mean(0), half_width(y), **page.style[system], **BARS,
                      linestyle="", markersize=4)  # fmt: skip
    slanted = sum(map(len, names)) > 40
    axis.set_xticks(range(len(names)), names, rotation=30 if slanted else 0)


def _aside(i: int, n: int, width: float) -> float:
    """Where the i-th of n systems stands beside the middle of its group."""
    return ((i + 0.5) / n - 0.5) * width


def _k_places(ks: Sequence[str], i: int, n: int) -> np.ndarray:
    """Places of the i-th of n systems on an axis of powers of 2."""
    return np.array([int(k) for k in ks]) * 2 ** _aside(i, n, 0.5)


def _axis_of_k(axis: Any, ks: Sequence[str]) -> bool:
    """Ticks at each k; False, and a word instead, where there is none."""
    axis.set_xlabel("k", color=INK, fontsize=9)
    if not ks:
        say(axis, "no held-out questions")
        return False
    axis.set_xscale("log", base=2)
    axis.set_xticks([int(k) for k in ks], ks)
    axis.minorticks_off()
    return True


def _zero(axis: Any) -> None:
    axis.axhline(0, color=INK, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1.5)


def _missing(axis: Any, page: Page, shown: SERIES) -> bool:
    """Say which systems do not log a number; False where none does."""
    without = [system for system in page.runs if system not in shown]
    if not shown:
        say(axis, "not logged")
    elif without:
        whom = ", ".join(without) if len(without) <= 3 else f"{len(without)} systems"
        axis.set_xlabel(f"step (not logged by {whom})", color=INK, fontsize=9)
    return bool(shown)


def say(axis: Any, text: str) -> None:
    """In the middle of a panel that has nothing to draw."""
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", color=INK, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])

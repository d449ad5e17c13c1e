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
import pandas as pd

from riskpo.compare.numbers import BOUND, EVAL, Runs, responses
from riskpo.metrics.intervals import t_points
from riskpo.report.plots import INK

# Mostly Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = (
    "0072b2 e69f00 d55e00 009e73 cc79a7 56b4e9 6b5b95 222222 999933 882255 8c564b 9a9a9a"
).split()
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
LINES = ("-", "--", ":")
MARKS = 5  # markers on a line, about
Series = dict[str, pd.DataFrame]  # system -> a row per seed, a column per step (or k, or stratum)
Draw = Callable[[Any, "Page"], None]


class Page:
    """The runs, and how each system looks."""

    def __init__(self, runs: Runs, against: str) -> None:
        self.runs, self.against = runs, against
        self.systems = list(dict.fromkeys(system for system, _ in runs))
        n = len(COLOURS)  # the second dozen have other markers than the first
        self.style = {
            name: {"color": "#" + COLOURS[i % n], "marker": MARKERS[(i + i // n) % n]}
            for i, name in enumerate(self.systems)
        }
        self.seeds = len({seed for _, seed in runs})
        self.steps = len(next(iter(runs.values())).loc[1:])
        self.window = max(self.steps // 15, 1) // 2 * 2 + 1  # centred

    def rows(self, of: Callable[[pd.DataFrame], pd.Series]) -> Series:
        """`of` every run, by system and seed; a system without any number is left out."""
        found: Series = {}
        for system in self.systems:
            rows = {seed: of(run) for (name, seed), run in self.runs.items() if name == system}
            if any(row.notna().any() for row in rows.values()):
                found[system] = pd.DataFrame.from_dict(rows, orient="index")
        return found

    def logged(self, name: str) -> Series:
        """That number by step, nan where a step has none."""
        return self.rows(lambda run: run.loc[1:].get(name, pd.Series(dtype=float)))

    def series(self, name: str) -> Series:
        """The same, smoothed over `window` steps."""
        return {s: smoothed(y, self.window) for s, y in self.logged(name).items()}

    def minus_against(self, series: Series) -> Series:
        """Every other system's series minus that of `against`, seed by seed."""
        reference = series.get(self.against)
        if reference is None:
            return {}
        return {s: y - reference for s, y in series.items() if s != self.against}

    def held_out(self, prefix: str, which: int) -> Series:
        """The held-out numbers that begin with `prefix` in an evaluation (0 first, -1 last).

        Only systems of which every run was evaluated, and the names that all of those have.
        """

        def numbers(run: pd.DataFrame) -> pd.Series:
            evals = run.filter(like=EVAL).dropna(how="all")
            found = evals.iloc[which] if len(evals) else pd.Series(dtype=float)
            return found.filter(regex=f"^{EVAL}{prefix}").rename(lambda k: k[len(EVAL + prefix) :])

        every = {s: y for s, y in self.rows(numbers).items() if not y.isna().all(axis=1).any()}
        shared = pd.concat(every).dropna(axis=1).columns if every else []
        return {s: y[shared] for s, y in every.items() if len(shared)}


def smoothed(y: pd.DataFrame, window: int) -> pd.DataFrame:
    """Rows averaged over `window` steps; a nan is the number before it, nans at the start stay."""
    filled = y.ffill(axis=1)
    mean = filled.T.rolling(window, center=True, min_periods=1).mean().T
    return mean.where(filled.notna())


def middle(y: pd.DataFrame) -> pd.Series:
    """Mean over seeds; nan where a seed has none."""
    return y.mean(skipna=False)


def half_width(y: pd.DataFrame) -> pd.Series:
    """Half of the 95 % t-interval of the mean over seeds; 0 for one seed."""
    if len(y) < 2:
        return middle(y) * 0.0
    return y.std(skipna=False) * t_points(len(y)) / np.sqrt(len(y))


# Panels ---------------------------------------------------------------------------------------


def by_step(
    *names: str,
    labels: Sequence[str] = (),
    band: bool = False,
    share: bool = False,
    minus: bool = False,
    zero: bool = False,
) -> Draw:
    """Up to three numbers by step, a style of line each, named by `labels` in a legend.

    band   with intervals, which of a share end at 0 and 1
    minus  minus those of the system compared against, seed by seed
    zero   with a line at 0
    """

    def draw(axis: Any, page: Page) -> None:
        logged: Series = {}
        drawn: Series = {}
        for name, line in reversed([*zip(names, LINES, strict=False)]):  # the first on top
            logged = page.series(name)
            drawn = page.minus_against(logged) if minus else logged
            _lines(axis, page, drawn, line=line, band=band, share=share)
        if logged and not drawn:
            say(axis, "nothing to compare with")
        elif _missing(axis, page, logged):
            if zero:
                _zero(axis)
            if labels:
                for label, line in zip(labels, LINES, strict=False):
                    axis.plot([], [], color=INK, linestyle=line, linewidth=1.3, label=label)
                low, high = axis.get_ylim()
                axis.set_ylim(low, high + (high - low) / 8)  # a row for the legend
                axis.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper center", ncols=3)

    return draw


def covariances(axis: Any, page: Page) -> None:
    """The difference over all steps as the sum of its terms; the lower one is omega cov_lower."""
    gap, upper = page.logged("cov_gap"), page.logged("cov_upper")
    shown = {}
    for system in [s for s in upper if s in gap]:
        terms = {"difference": gap[system], "= upper term": upper[system]}
        terms["+ lower term"] = gap[system] - upper[system]
        shown[system] = pd.DataFrame({name: y.mean(axis=1) for name, y in terms.items()})
    if _points(axis, page, shown, "not logged"):
        _zero(axis)
    axis.set_xlabel("mean over all steps")


def by_responses(axis: Any, page: Page) -> None:
    """Mean reward against the responses sampled for it."""
    _lines(axis, page, page.series("reward_mean"), x=page.rows(lambda r: responses(r) / 1000))
    axis.set_xlabel("responses sampled (thousands)")


def entropy_by_reward(axis: Any, page: Page) -> None:
    """Token entropy against mean reward, a large marker at the last step."""
    reward, entropy = page.series("reward_mean"), page.series("sampled_entropy")
    for system in [s for s in reward if s in entropy]:
        style, x, y = page.style[system], middle(reward[system]), middle(entropy[system])
        axis.plot(x, y, color=style["color"], linewidth=0.9, alpha=0.6)
        x, y = x.iloc[-1:], y.iloc[-1:]
        axis.plot(x, y, **style, markersize=9, markeredgecolor="white", zorder=4)
    _missing(axis, page, entropy)
    axis.set_xlabel("mean reward (marker: last step)")


def pass_at_k(axis: Any, page: Page) -> None:
    """Held-out pass@k at the end, means only, over the mean start."""
    start = page.held_out("pass@", 0)
    if _points(axis, page, page.held_out("pass@", -1), bars=False, line="-"):
        axis.plot(middle(pd.concat(start)).to_numpy(), color=INK, linestyle=":", linewidth=1.5)
    axis.set_xlabel("k")


def pass_rise(axis: Any, page: Page) -> None:
    """Its rise since the start of the same run."""
    start = page.held_out("pass@", 0)
    rise = {s: y - start[s] for s, y in page.held_out("pass@", -1).items()}
    if _points(axis, page, rise, line="-"):
        _zero(axis)
    axis.set_xlabel("k")


def strata(axis: Any, page: Page) -> None:
    """Held-out mean reward at the end, by stratum of the data."""
    lack = "no strata" if page.held_out("", -1) else "no held-out questions"
    _points(axis, page, page.held_out("reward_", -1), lack)
    axis.set_xlabel("stratum")


def gradient_norm(axis: Any, page: Page) -> None:
    """Before it is shortened, and the length that it is shortened to."""
    by_step("grad_norm")(axis, page)
    for bound in sorted({run[BOUND].iloc[0] for run in page.runs.values()} - {None}):
        axis.axhline(bound, color=INK, linestyle=":", linewidth=1.2)


# How they draw --------------------------------------------------------------------------------


def _lines(
    axis: Any,
    page: Page,
    series: Series,
    *,
    x: Series | None = None,
    line: str = "-",
    band: bool = False,
    share: bool = False,
) -> None:
    """A line per system, its markers above all lines and not where another system has its."""
    for system, seeds in series.items():
        style, y = page.style[system], middle(seeds)
        at = seeds.columns if x is None else middle(x[system])
        axis.plot(at, y, color=style["color"], linestyle=line, linewidth=1.3)
        place = (page.systems.index(system) + 0.5) / len(page.systems)
        every = max(len(y) // MARKS, 1)
        axis.plot(at, y, **style, linestyle="", markersize=5, markeredgewidth=0, zorder=3,
                  markevery=(min(int(place * every), len(y) - 1), every))  # fmt: skip
        half = half_width(seeds)
        if band and half.any():
            ends = [e.clip(0, 1) if share else e for e in (y - half, y + half)]
            axis.fill_between(at, *ends, color=style["color"], alpha=0.12, linewidth=0)


def _points(
    axis: Any,
    page: Page,
    shown: Series,
    lack: str = "no held-out questions",
    *,
    bars: bool = True,
    line: str = "",
) -> bool:
    """Means over seeds by the names of the columns, with bars for their intervals side by side.

    False, and `lack` in the panel, where there is nothing to show.
    """
    for i, (system, y) in enumerate(shown.items()):
        aside = ((i + 0.5) / len(shown) - 0.5) * (0.5 if line else 0.7) * bars
        axis.errorbar(np.arange(y.shape[1]) + aside, middle(y), half_width(y) if bars else None,
                      **page.style[system], linestyle=line, linewidth=1.1, markersize=4,
                      elinewidth=0.8, capsize=0)  # fmt: skip
    if not shown:
        say(axis, lack)
        return False
    names = list(next(iter(shown.values())).columns)
    axis.set_xticks(range(len(names)), names, rotation=30 if sum(map(len, names)) > 40 else 0)
    return True


def _zero(axis: Any) -> None:
    axis.axhline(0, color=INK, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1.5)


def _missing(axis: Any, page: Page, shown: Series) -> bool:
    """Say which systems do not log a number; False where none does."""
    without = [system for system in page.systems if system not in shown]
    if not shown:
        say(axis, "not logged")
    elif without:
        whom = ", ".join(without) if len(without) <= 3 else f"{len(without)} systems"
        axis.set_xlabel(f"step (not logged by {whom})")
    return bool(shown)


def say(axis: Any, text: str) -> None:
    """In the middle of a panel that has nothing to draw."""
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", color=INK, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])

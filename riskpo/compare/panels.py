"""The panels of a comparison's picture: what each takes from the logs, and how it draws it.

The numbers are tables with a row per (system, seed) and a column per step, k or stratum. A line is
the mean over seeds; numbers by step are smoothed first. Bands and bars are 95 % t-intervals over
seeds. Differences are taken seed by seed first, so that the level of each seed's warm start drops
out. The interval of a share ends at 0 and at 1. Colour and marker together name the system, also
where lines coincide. Where a panel has several numbers, the style of the line names the number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from riskpo.compare.numbers import BOUND, EVAL, Runs, paired, responses
from riskpo.metrics.intervals import t_points
from riskpo.report.plots import INK

# Mostly Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = (
    "0072b2 e69f00 d55e00 009e73 cc79a7 56b4e9 6b5b95 222222 999933 882255 8c564b 9a9a9a"
).split()
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
LINES = ("-", "--", ":")
MARKS = 5  # markers on a line, about
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

    def rows(self, of: Callable[[pd.DataFrame], pd.Series]) -> pd.DataFrame:
        """`of` every run, a row per (system, seed); a system without any number is left out."""
        rows = pd.DataFrame({key: of(run) for key, run in self.runs.items()}).T
        rows.index.names = ["system", "seed"]
        return rows[rows.notna().any(axis=1).groupby(level="system").transform("any")]

    def logged(self, name: str) -> pd.DataFrame:
        """That number by step, nan where a step has none."""
        return self.rows(lambda run: run.loc[1:].get(name, pd.Series(dtype=float)))

    def series(self, name: str) -> pd.DataFrame:
        """The same, smoothed over `window` steps."""
        return smoothed(self.logged(name), self.window)

    def held_out(self, prefix: str, which: int) -> pd.DataFrame:
        """The held-out numbers that begin with `prefix` in an evaluation (0 first, -1 last).

        Only systems of which every run was evaluated, and the names that all of those have.
        """

        def numbers(run: pd.DataFrame) -> pd.Series:
            evals = run.filter(like=EVAL).dropna(how="all")
            found = evals.iloc[which] if len(evals) else pd.Series(dtype=float)
            return found.filter(regex=f"^{EVAL}{prefix}").rename(lambda k: k[len(EVAL + prefix) :])

        rows = self.rows(numbers)
        every = rows[rows.notna().any(axis=1).groupby(level="system").transform("all")]
        shared = every.dropna(axis=1)
        return shared if len(shared.columns) else shared[:0]


def by_system(rows: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame]]:
    """Each system with its rows, one per seed."""
    return rows.groupby(level="system", sort=False)


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
        for name, line in reversed([*zip(names, LINES, strict=False)]):  # the first on top
            logged = drawn = page.series(name)
            if minus and page.against in logged.index:
                drawn = paired(logged, page.against)
            elif minus:
                drawn = logged[:0]
            _lines(axis, page, drawn, line=line, band=band, share=share)
        if len(logged) and drawn.empty:
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
    """Cov(l, A_mean) - Cov(l, A_MVaR) over all steps, beside the two terms that it is the sum of:
    cov_upper, and omega times cov_lower."""
    gap, upper = page.logged("cov_gap"), page.logged("cov_upper")
    terms = {"difference": gap, "= upper term": upper, "+ lower term": gap - upper}
    shown = pd.DataFrame({name: y.mean(axis=1) for name, y in terms.items()}).dropna()
    if _points(axis, page, shown, "not logged"):
        _zero(axis)
    axis.set_xlabel("mean over all steps")


def by_responses(axis: Any, page: Page) -> None:
    """Mean reward against the responses sampled for it."""
    sampled = page.rows(lambda run: responses(run) / 1000)
    _lines(axis, page, page.series("reward_mean"), x=sampled)
    axis.set_xlabel("responses sampled (thousands)")


def entropy_by_reward(axis: Any, page: Page) -> None:
    """Token entropy against mean reward, a large marker at the last step."""
    reward, entropy = page.series("reward_mean"), page.series("sampled_entropy")
    for system, rows in by_system(entropy[entropy.index.isin(reward.index)]):
        style, x, y = page.style[system], middle(reward.loc[system]), middle(rows)
        axis.plot(x, y, color=style["color"], linewidth=0.9, alpha=0.6)
        x, y = x.iloc[-1:], y.iloc[-1:]
        axis.plot(x, y, **style, markersize=9, markeredgecolor="white", zorder=4)
    _missing(axis, page, entropy)
    axis.set_xlabel("mean reward (marker: last step)")


def pass_at_k(axis: Any, page: Page) -> None:
    """Mean held-out pass@k at the end; dotted, the mean of all runs at the start."""
    start = page.held_out("pass@", 0)
    if _points(axis, page, page.held_out("pass@", -1), bars=False, line="-"):
        axis.plot(middle(start).to_numpy(), color=INK, linestyle=":", linewidth=1.5)
    axis.set_xlabel("k")


def pass_rise(axis: Any, page: Page) -> None:
    """The rise of held-out pass@k since the start of the same run."""
    rise = page.held_out("pass@", -1) - page.held_out("pass@", 0)
    if _points(axis, page, rise, line="-"):
        _zero(axis)
    axis.set_xlabel("k")


def strata(axis: Any, page: Page) -> None:
    """Held-out mean reward at the end, by stratum of the data."""
    lack = "no held-out questions" if page.held_out("", -1).empty else "no strata"
    _points(axis, page, page.held_out("reward_", -1), lack)
    axis.set_xlabel("stratum")


def gradient_norm(axis: Any, page: Page) -> None:
    """The gradient norm before clipping; dotted, max_grad_norm of each run."""
    by_step("grad_norm")(axis, page)
    for bound in sorted({run[BOUND].iloc[0] for run in page.runs.values()} - {None}):
        axis.axhline(bound, color=INK, linestyle=":", linewidth=1.2)


# How they draw --------------------------------------------------------------------------------


def _lines(
    axis: Any,
    page: Page,
    series: pd.DataFrame,
    *,
    x: pd.DataFrame | None = None,
    line: str = "-",
    band: bool = False,
    share: bool = False,
) -> None:
    """A line per system. Markers lie above all lines, at other steps than other systems' do."""
    for system, rows in by_system(series):
        style, y = page.style[system], middle(rows)
        at = rows.columns if x is None else middle(x.loc[system])
        axis.plot(at, y, color=style["color"], linestyle=line, linewidth=1.3)
        place = (page.systems.index(system) + 0.5) / len(page.systems)
        every = max(len(y) // MARKS, 1)
        axis.plot(at, y, **style, linestyle="", markersize=5, markeredgewidth=0, zorder=3,
                  markevery=(min(int(place * every), len(y) - 1), every))  # fmt: skip
        half = half_width(rows)
        if band and half.any():
            ends = [e.clip(0, 1) if share else e for e in (y - half, y + half)]
            axis.fill_between(at, *ends, color=style["color"], alpha=0.12, linewidth=0)


def _points(
    axis: Any,
    page: Page,
    shown: pd.DataFrame,
    lack: str = "no held-out questions",
    *,
    bars: bool = True,
    line: str = "",
) -> bool:
    """Means over seeds by the names of the columns, with bars for their intervals side by side.

    False, and `lack` in the panel, where there is nothing to show.
    """
    if shown.empty:
        say(axis, lack)
        return False
    count = len(shown.index.unique("system"))
    for i, (system, y) in enumerate(by_system(shown)):
        aside = ((i + 0.5) / count - 0.5) * (0.5 if line else 0.7) * bars
        axis.errorbar(np.arange(y.shape[1]) + aside, middle(y), half_width(y) if bars else None,
                      **page.style[system], linestyle=line, linewidth=1.1, markersize=4,
                      elinewidth=0.8, capsize=0)  # fmt: skip
    names = list(shown.columns)
    axis.set_xticks(range(len(names)), names, rotation=30 if sum(map(len, names)) > 40 else 0)
    return True


def _zero(axis: Any) -> None:
    axis.axhline(0, color=INK, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1.5)


def _missing(axis: Any, page: Page, shown: pd.DataFrame) -> bool:
    """Say which systems do not log a number; False where none does."""
    without = [system for system in page.systems if system not in shown.index]
    if shown.empty:
        say(axis, "not logged")
    elif without:
        whom = ", ".join(without) if len(without) <= 3 else f"{len(without)} systems"
        axis.set_xlabel(f"step (not logged by {whom})")
    return not shown.empty


def say(axis: Any, text: str) -> None:
    """Write the reason into a panel that has nothing to draw."""
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", color=INK, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])

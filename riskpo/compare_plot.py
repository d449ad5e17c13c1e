"""The picture of a comparison: panels with a line per system and its interval over seeds.

Seeds differ in their warm start far more than systems differ on one seed. The bands therefore show
the spread that matters beside the other systems: each seed's mean over the systems is taken out
before the 95 % t-interval is made (intervals "within subjects"). The lines are plain means.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from riskpo.compare_numbers import RunLogs
from riskpo.intervals import t_points
from riskpo.plots import INK, PAPER, dress, smooth

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend has to be chosen first

# Okabe and Ito's colours, told apart by colour-blind readers too; then the same again, dashed.
COLOURS = ("#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#6b5b95", "#222222")
Draw = Callable[[Any, "Page"], None]


class Page:
    """The runs of every system as arrays [seeds, steps]."""

    def __init__(self, runs: dict[str, dict[int, RunLogs]]) -> None:
        self.runs = runs
        self.style = {
            name: (COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "--")
            for i, name in enumerate(runs)
        }

    def series(self, name: str) -> dict[str, np.ndarray]:
        """{system: [seeds, steps]} where it has that number, smoothed over a fifteenth of them."""
        found = {}
        for system, runs in self.runs.items():
            rows = [[r.get(name, np.nan) for r in run.steps] for run in runs.values()]
            if not np.isnan(rows).all():
                window = max(len(rows[0]) // 15, 1)
                found[system] = np.stack([smooth(filled(np.array(row)), window) for row in rows])
        return found

    def held_out(self, prefix: str) -> tuple[list[str], dict[str, np.ndarray]]:
        """What follows `prefix` in the names of the last evaluations, and {system: [seeds, n]}."""
        last = {s: [run.evals[-1] for run in runs.values()] for s, runs in self.runs.items()}
        first = next(iter(last.values()))[0]
        names = [n for n in first if n.startswith(prefix)]
        found = {s: np.array([[e[n] for n in names] for e in evals]) for s, evals in last.items()}
        return [n.removeprefix(prefix) for n in names], found


def filled(values: np.ndarray) -> np.ndarray:
    """[n] with each nan replaced by the last number before it; all nan stays so."""
    known = np.where(np.isnan(values), -1, np.arange(len(values)))
    last = np.maximum.accumulate(known)
    return np.where(last < 0, np.nan, values[np.maximum(last, 0)])


def draw_page(path: Path, runs: dict[str, dict[int, RunLogs]]) -> Path:
    """Write the PNG; returns its path."""
    page = Page(runs)
    panels: tuple[tuple[str, Draw], ...] = (
        ("mean reward", _by_step("reward_mean")),
        ("lower tail: RVaR 0-.2 of bundle scores", _by_step("rvar_lower")),
        ("MVaR of bundle scores", _by_step("mvar")),
        ("token entropy (nats)", _by_step("sampled_entropy")),
        ("mean reward, by responses sampled", _by_responses),
        ("entropy at equal mean reward", _entropy_by_reward),
        ("held-out pass@k at the end (dotted: start)", _pass_at_k),
        ("rise of pass@k since the start", _pass_gain),
        ("clipped share", _by_step("clip_fraction")),
        ("share of responses with advantage 0", _by_step("zero_advantage_fraction")),
        ("quantiles in use: q_alpha, q_beta", _quantiles),
        ("held-out reward by stratum", _strata),
    )
    figure, axes = plt.subplots(4, 3, figsize=(15, 16), dpi=110, layout="constrained")
    for axis, (title, draw) in zip(axes.flat, panels, strict=True):
        dress(axis, "")
        axis.set_title(title, color=INK, fontsize=11, loc="left")
        draw(axis, page)
    handles = [
        axes.flat[0].plot([], [], color=colour, linestyle=line, linewidth=2.5, label=name)[0]
        for name, (colour, line) in page.style.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=11)
    figure.savefig(path, facecolor=PAPER)
    plt.close(figure)
    return path


def half_widths(series: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{system: [n]} half of the 95 % t-interval of [seeds, n] without the seeds' own levels."""
    seeds = len(next(iter(series.values())))
    if seeds < 2:
        return {system: np.zeros(y.shape[1]) for system, y in series.items()}
    level = np.mean(list(series.values()), axis=0)  # [seeds, n]
    return {
        system: t_points(seeds) * (y - level).std(0, ddof=1) / np.sqrt(seeds)
        for system, y in series.items()
    }


def _by_step(name: str) -> Draw:
    def draw(axis: Any, page: Page) -> None:
        series = page.series(name)
        _bands(axis, page, series, lambda y: np.arange(1, y.shape[1] + 1))

    return draw


def _bands(
    axis: Any,
    page: Page,
    series: dict[str, np.ndarray],
    x_of: Callable[[np.ndarray], np.ndarray],
    marker: str = "",
) -> None:
    """Means over seeds with their bands; nothing where no system has the number."""
    half = half_widths(series) if series else {}
    for system, y in series.items():
        (colour, line), mean, x = page.style[system], y.mean(0), x_of(y)
        axis.plot(x, mean, color=colour, linestyle=line, linewidth=1.8, marker=marker, markersize=3)
        low, high = mean - half[system], mean + half[system]
        axis.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)


def _by_responses(axis: Any, page: Page) -> None:
    for system, y in page.series("reward_mean").items():
        x = np.mean([run.responses() for run in page.runs[system].values()], axis=0)
        colour, line = page.style[system]
        axis.plot(x / 1000, y.mean(0), color=colour, linestyle=line, linewidth=1.8)
    axis.set_xlabel("responses sampled (thousands)", color=INK, fontsize=9)


def _entropy_by_reward(axis: Any, page: Page) -> None:
    reward, entropy = page.series("reward_mean"), page.series("sampled_entropy")
    for system in reward.keys() & entropy.keys():
        colour, line = page.style[system]
        x, y = reward[system].mean(0), entropy[system].mean(0)
        axis.plot(x, y, color=colour, linestyle=line, linewidth=1.5)
        axis.plot(x[-1:], y[-1:], color=colour, marker="o", markersize=6)
    axis.set_xlabel("mean reward (dot: last step)", color=INK, fontsize=9)


def _over_k(axis: Any, page: Page, gain: bool) -> None:
    ks, last = page.held_out("pass@")
    runs = next(iter(page.runs.values())).values()
    start = np.array([[run.evals[0][f"pass@{k}"] for k in ks] for run in runs])  # [seeds, k]
    x = np.array([int(k) for k in ks])
    shown = {system: y - start if gain else y for system, y in last.items()}
    _bands(axis, page, shown, lambda y: x, marker="o")
    level = np.zeros(len(x)) if gain else start.mean(0)
    axis.plot(x, level, color=INK, linestyle=":", linewidth=1.5)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("k", color=INK, fontsize=9)


def _pass_at_k(axis: Any, page: Page) -> None:
    _over_k(axis, page, gain=False)


def _pass_gain(axis: Any, page: Page) -> None:
    _over_k(axis, page, gain=True)


def _quantiles(axis: Any, page: Page) -> None:
    for name in ("q_alpha", "q_beta"):
        _by_step(name)(axis, page)


def _strata(axis: Any, page: Page) -> None:
    names, last = page.held_out("reward_")
    half, width = half_widths(last), 0.8 / len(last)
    for i, (system, y) in enumerate(last.items()):
        x = np.arange(len(names)) + (i + 0.5) * width - 0.4
        axis.bar(x, y.mean(0), width, color=page.style[system][0], yerr=half[system],
                 error_kw={"linewidth": 0.8, "ecolor": INK})  # fmt: skip
    axis.set_xticks(range(len(names)), names)
    axis.set_xlabel("digits of the operands", color=INK, fontsize=9)

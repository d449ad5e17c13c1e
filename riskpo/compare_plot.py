"""The picture of a comparison: panels with a line per system and its interval over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from riskpo.compare_numbers import EVAL, GAIN, RunLogs, Table
from riskpo.intervals import t_points
from riskpo.plots import INK, PAPER, dress, smooth

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend has to be chosen first

# Okabe and Ito's colours, told apart by colour-blind readers too; then the same again, dashed.
COLOURS = ("#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#6b5b95", "#222222")
Draw = Callable[[Any, "Page"], None]


class Page:
    """The runs of every system as arrays [seeds, steps]."""

    def __init__(self, runs: dict[str, dict[int, RunLogs]], table: Table) -> None:
        self.runs, self.table = runs, table
        self.style = {
            name: (COLOURS[i % len(COLOURS)], "-" if i < len(COLOURS) else "--")
            for i, name in enumerate(runs)
        }

    def series(self, system: str, name: str) -> np.ndarray:
        """[seeds, steps], smoothed over a fifteenth of the steps, nan where a step lacks it."""
        rows = [[r.get(name, np.nan) for r in run.steps] for run in self.runs[system].values()]
        shortest = min(map(len, rows))
        window = max(shortest // 15, 1)
        return np.stack([smooth(filled(np.array(row[:shortest])), window) for row in rows])


def filled(values: np.ndarray) -> np.ndarray:
    """[n] with each nan replaced by the last number before it; all nan stays so."""
    known = np.where(np.isnan(values), -1, np.arange(len(values)))
    last = np.maximum.accumulate(known)
    return np.where(last < 0, np.nan, values[np.maximum(last, 0)])


def draw_page(path: Path, runs: dict[str, dict[int, RunLogs]], table: Table) -> Path:
    """Write the PNG; returns its path."""
    page = Page(runs, table)
    panels: tuple[tuple[str, Draw], ...] = (
        ("mean reward", _by_step("reward_mean")),
        ("lower tail: RVaR 0-.2 of bundle scores", _by_step("rvar_lower")),
        ("MVaR of bundle scores", _by_step("mvar")),
        ("token entropy (nats)", _by_step("sampled_entropy")),
        ("mean reward, by responses sampled", _by_responses),
        ("entropy at equal mean reward", _entropy_by_reward),
        ("held-out pass@k at the end (dots: start)", _pass_at_k),
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


def _by_step(name: str) -> Draw:
    def draw(axis: Any, page: Page) -> None:
        for system in page.runs:
            y = page.series(system, name)
            _band(axis, np.arange(1, y.shape[1] + 1), y, page.style[system])

    return draw


def _band(axis: Any, x: np.ndarray, y: np.ndarray, style: tuple[str, str]) -> None:
    """Mean of [seeds, n] with its 95 % t-interval."""
    colour, line = style
    mean, seeds = y.mean(0), len(y)
    axis.plot(x, mean, color=colour, linestyle=line, linewidth=1.8)
    if seeds > 1:
        half = t_points(seeds) * y.std(0, ddof=1) / np.sqrt(seeds)
        axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.10, linewidth=0)


def _by_responses(axis: Any, page: Page) -> None:
    for system, seeds in page.runs.items():
        y = page.series(system, "reward_mean").mean(0)
        x = np.mean([run.responses()[: len(y)] for run in seeds.values()], axis=0)
        colour, line = page.style[system]
        axis.plot(x / 1000, y, color=colour, linestyle=line, linewidth=1.8)
    axis.set_xlabel("responses sampled (thousands)", color=INK, fontsize=9)


def _entropy_by_reward(axis: Any, page: Page) -> None:
    for system in page.runs:
        colour, line = page.style[system]
        reward, entropy = (
            page.series(system, n).mean(0) for n in ("reward_mean", "sampled_entropy")
        )
        axis.plot(reward, entropy, color=colour, linestyle=line, linewidth=1.5)
        axis.plot(reward[-1:], entropy[-1:], color=colour, marker="o", markersize=6)
    axis.set_xlabel("mean reward (dot: last step)", color=INK, fontsize=9)


def _curve_over_k(axis: Any, page: Page, prefix: str) -> None:
    for system, row in page.table.items():
        names = [n for n in row if n.startswith(prefix)]
        ks = [int(n.removeprefix(prefix)) for n in names]
        mean, low, high = (
            np.array([getattr(row[n], part) for n in names]) for part in ("value", "low", "high")
        )
        colour, line = page.style[system]
        axis.plot(ks, mean, color=colour, linestyle=line, linewidth=1.8, marker="o", markersize=3)
        axis.fill_between(ks, low, high, color=colour, alpha=0.10, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("k", color=INK, fontsize=9)


def _pass_at_k(axis: Any, page: Page) -> None:
    _curve_over_k(axis, page, EVAL + "pass@")
    first = [seeds for seeds in page.runs.values()][0]
    starts = [run.evals[0] for run in first.values() if run.evals]
    names = [n for n in (starts[0] if starts else ()) if n.startswith("pass@")]
    ks = [int(n.removeprefix("pass@")) for n in names]
    axis.plot(ks, [np.mean([s[n] for s in starts]) for n in names], "o:", color=INK, markersize=3)


def _pass_gain(axis: Any, page: Page) -> None:
    _curve_over_k(axis, page, GAIN + "pass@")
    axis.axhline(0, color=INK, linewidth=0.8)


def _quantiles(axis: Any, page: Page) -> None:
    for system, row in page.table.items():
        for name in ("q_alpha", "q_beta"):
            if name in row:
                y = page.series(system, name)
                _band(axis, np.arange(1, y.shape[1] + 1), y, page.style[system])


def _strata(axis: Any, page: Page) -> None:
    prefix = EVAL + "reward_"
    names = sorted({n for row in page.table.values() for n in row if n.startswith(prefix)})
    width = 0.8 / max(len(page.table), 1)
    for i, (system, row) in enumerate(page.table.items()):
        shown: Sequence[str] = [n for n in names if n in row]
        x = np.arange(len(shown)) + (i + 0.5) * width - 0.4
        mean = np.array([row[n].value for n in shown])
        high = np.array([row[n].high for n in shown])
        axis.bar(x, mean, width, color=page.style[system][0], yerr=high - mean,
                 error_kw={"linewidth": 0.8, "ecolor": INK})  # fmt: skip
    axis.set_xticks(range(len(names)), [n.removeprefix(prefix) for n in names])
    axis.set_xlabel("digits of the operands", color=INK, fontsize=9)

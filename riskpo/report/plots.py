"""Curves of a run, as PNG, from its JSONL log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from riskpo.report.logs import average_name, read_records

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend has to be chosen first

INK, PAPER, GRID = "#22313f", "#ffffff", "#e3e7ea"
PANELS = (
    ("reward_mean", "mean reward", "#1f77b4"),
    ("rvar_lower", "lower-tail RVaR of bundle scores", "#c0392b"),
    ("entropy", "token entropy (nats)", "#8e6bbf"),
)
HELD_OUT = "#2e8b57"


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average whose window shrinks at the ends; [n] -> [n]."""
    odd = window // 2 * 2 + 1
    return pd.Series(values).rolling(odd, center=True, min_periods=1).mean().to_numpy()


def plot(run_dir: str | Path) -> Path:
    """Write run_dir/curves.png: reward, lower tail, entropy and held-out accuracy by step."""
    steps, evaluations = read_records(run_dir, "step"), read_records(run_dir, "eval")
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), dpi=130, layout="constrained")
    for axis, (name, label, colour) in zip(axes.flat[:3], PANELS, strict=True):
        _curve(axis, [r for r in steps if name in r], name, colour)
        dress(axis, label)
    _held_out(axes.flat[3], evaluations)
    figure.suptitle(Path(run_dir).name, color=INK, fontsize=12)
    path = Path(run_dir) / "curves.png"
    figure.savefig(path, facecolor=PAPER)
    plt.close(figure)
    return path


def _curve(axis: Any, records: list[dict[str, Any]], name: str, colour: str) -> None:
    """The smoothed line over the faint raw one."""
    x = np.array([r["step"] for r in records])
    y = np.array([r[name] for r in records], dtype=float)
    enough = len(x) > 10  # to smooth; fewer are drawn as they are
    axis.plot(x, y, color=colour, alpha=0.22 if enough else 1.0, linewidth=0.8 if enough else 2.0)
    if enough:
        window = max(len(x) // 15, 5)
        axis.plot(x, smooth(y, window), color=colour, linewidth=2.0, label=f"mean of {window}")
        axis.legend(frameon=False, fontsize=8, labelcolor=INK)


def _held_out(axis: Any, records: list[dict[str, Any]]) -> None:
    """avg@k with its 95 % interval over questions."""
    name = average_name(records)
    if name is not None:
        table = pd.DataFrame(records)
        ends = table[f"{name}_low"], table[f"{name}_high"]
        axis.fill_between(table["step"], *ends, color=HELD_OUT, alpha=0.15, linewidth=0)
        axis.plot(table["step"], table[name], color=HELD_OUT, lw=2.0, marker="o", markersize=4)
    dress(axis, f"held-out {name or 'accuracy'} (95 % interval)")


def dress(axis: Any, label: str) -> None:
    axis.set_xlabel("step", color=INK, fontsize=9)
    axis.set_ylabel(label, color=INK, fontsize=9)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=8, length=0)
    for side in axis.spines:
        axis.spines[side].set_visible(side in ("left", "bottom"))
        axis.spines[side].set_color(GRID)

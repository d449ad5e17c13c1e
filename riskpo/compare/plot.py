"""The picture of a comparison: its panels in a grid, the systems above them.

The warm start of a seed moves a level far more than a system does. Levels are therefore drawn
without intervals, which would cover every system; the table has them. The row below shows the
differences between systems, taken seed by seed, with their intervals.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

from riskpo.compare.numbers import Runs
from riskpo.compare.panels import (
    Draw,
    Page,
    by_responses,
    by_step,
    covariances,
    entropy_by_reward,
    gradient_norm,
    pass_at_k,
    pass_rise,
    strata,
)
from riskpo.report.plots import INK, PAPER, dress

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend has to be chosen first

COLUMNS = 3
WIDTH = 46  # letters of a title above one column
MEANS = "no interval"


def panels(against: str) -> tuple[tuple[str, Draw], ...]:
    """(title, what draws it), by rows."""
    levels = {
        "reward_mean": "mean reward",
        "rvar_lower": "lower tail (RVaR 0-.2)",
        "sampled_entropy": "token entropy (nats)",
    }
    extremes = ("advantage_max", "advantage_mean", "advantage_min")
    return (
        *((f"{title}, {MEANS}", by_step(name)) for name, title in levels.items()),
        *(
            (
                f"{title.partition(' (')[0]} minus {against}, paired 95 %",
                by_step(name, band=True, minus=True, zero=True),
            )
            for name, title in levels.items()
        ),
        (f"MVaR of bundle scores, {MEANS}", by_step("mvar")),
        (f"mean reward by responses, {MEANS}", by_responses),
        (f"entropy by mean reward, {MEANS}", entropy_by_reward),
        (f"pass@k at the end (dotted: start), {MEANS}", pass_at_k),
        ("rise of pass@k since the start", pass_rise),
        ("held-out reward by stratum", strata),
        ("Cov(l, A_mean) - Cov(l, A_MVaR)", covariances),
        (
            f"advantages, {MEANS}",
            by_step(*extremes, labels=("highest", "mean", "lowest"), zero=True),
        ),
        (f"quantiles in use, {MEANS}", by_step("q_beta", "q_alpha", labels=("q_beta", "q_alpha"))),
        ("clipped share", by_step("clip_fraction", band=True, share=True)),
        ("share with advantage 0", by_step("zero_advantage_fraction", band=True, share=True)),
        (f"gradient norm (dotted: bound), {MEANS}", gradient_norm),
    )


def draw_page(path: Path, runs: Runs, against: str) -> Path:
    """Write the PNG; returns its path."""
    page, shown = Page(runs, against), panels(against)
    figure, axes = plt.subplots(
        len(shown) // COLUMNS, COLUMNS, figsize=(11, 18), dpi=150, layout="constrained"
    )
    for axis, (title, draw) in zip(axes.flat, shown, strict=True):
        dress(axis, "")
        fitting = 10 * min(1, WIDTH / len(title))
        axis.set_title(title, color=INK, fontsize=fitting, loc="left")
        draw(axis, page)
    handles = [
        axes.flat[0].plot([], [], **style, linewidth=2, label=name)[0]
        for name, style in page.style.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=10,
                  title=headline(page), title_fontsize=10)  # fmt: skip
    figure.savefig(path, facecolor=PAPER)
    plt.close(figure)
    return path


def headline(page: Page) -> str:
    """Seeds, steps, what a band is, and how far lines are smoothed."""
    band = "no intervals from one seed"
    if page.seeds > 1:
        band = "band or bar: 95 % t-interval over seeds (of the paired differences in 'minus')"
    counts = ((page.seeds, "seed"), (page.steps, "step"))
    seeds = ", ".join(f"{n} {what}{'s' * (n > 1)}" for n, what in counts)
    lines = "means" + f", smoothed over {page.window} steps" * (page.window > 1)
    return f"{seeds}; lines: {lines}; {band}"

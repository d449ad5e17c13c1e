"""The page of a comparison: a table in Markdown, the same numbers in JSON, and a picture."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch

from riskpo.compare.numbers import (
    EQUAL_REWARD,
    EVAL,
    GAIN,
    NORM_CLIPPED,
    Runs,
    Table,
    entropy_at_equal_reward,
    last_step,
    load,
    over_seeds,
    paired,
    responses,
    summaries,
)
from riskpo.compare.plot import draw_page
from riskpo.files import write_json, write_text
from riskpo.metrics.intervals import Interval

X = TypeVar("X")

LEARNING = {
    "reward_mean": "mean reward",
    "rvar_lower": "lower tail (RVaR 0-.2)",
    "mvar": "MVaR",
    "sampled_entropy": "token entropy",
    "clip_fraction": "clipped",
    "zero_advantage_fraction": "advantage 0",
    "grad_norm": "gradient norm",
    NORM_CLIPPED: "clipped by norm",
    "q_alpha": "q_alpha",
    "q_beta": "q_beta",
}
COVARIANCES = {
    "cov_mean": "Cov(l, A_mean)",
    "cov_mvar": "Cov(l, A_MVaR)",
    "cov_gap": "mean - MVaR",
    "cov_upper": "Cov(l, (R - q_beta)+)",
    "cov_lower": "Cov(l, (q_alpha - R)+)",
    "corr_mean": "Corr(l, A_mean)",
    "corr_mvar": "Corr(l, A_MVaR)",
}


def write_page(
    out: Path,
    page: str,
    systems: Sequence[str],
    seeds: Sequence[int],
    against: str,
    margins: Mapping[str, float] | None = None,
) -> list[Path]:
    """OUT/PAGE.md, .json and .png from the logs of finished runs.

    margins names the primary outcomes. ValueError where no run has a number of that name.
    """
    runs = load(out, systems, seeds)
    about = _about(runs, against) | {"margins": dict(margins or {})}
    views = {
        "steps": summaries(runs, lambda run: int(run.index[-1])),
        "responses": summaries(runs, lambda run: last_step(run, about["responses"])),
    }
    changes = {name: paired(view, against) for name, view in views.items()}
    changes["steps"][EQUAL_REWARD] = [
        entropy_at_equal_reward(runs[system, seed], runs[against, seed])
        for system, seed in changes["steps"].index
    ]
    tables = {name: over_seeds(view) for name, view in views.items()}
    differences = {name: over_seeds(change) for name, change in changes.items()}
    for name in about["margins"]:
        if name not in views["steps"]:
            raise ValueError(
                f"compare: got a margin for {name!r}; expected one of "
                f"{', '.join(views['steps'])}. Correct [margins]."
            )
    content = {
        "about": about,
        "over_seeds": {k: _plain(t) for k, t in tables.items()},
        f"minus {against}": {k: _plain(t) for k, t in differences.items()},
        "per_seed": {
            name: {
                system: {seed: row.dropna().to_dict() for seed, row in view.loc[system].iterrows()}
                for system in systems
            }
            for name, view in views.items()
        },
    }
    return [
        write_text(out / f"{page}.md", markdown(tables, differences, about)),
        write_json(out / f"{page}.json", content),
        draw_page(out / f"{page}.png", runs, against),
    ]


def _about(runs: Runs, against: str) -> dict[str, Any]:
    sampled = pd.Series({key: responses(run).iloc[-1] for key, run in runs.items()})
    seconds = sum(run.filter(regex=f"^({EVAL})?time_s$").sum().sum() for run in runs.values())
    return {
        "seeds": list(dict.fromkeys(seed for _, seed in runs)),
        "against": against,
        "steps": int(next(iter(runs.values())).index[-1]),
        "responses": sampled.min(),
        "sampled": sampled.groupby(level=0, sort=False).mean().to_dict(),
        "run_hours": round(seconds / 3600, 2),
        "machine": _machine(),
    }


def _machine() -> str:
    """This machine; `riskpo compare` writes the page where it made the runs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    named = "".join(f"{gpu}, " for gpu in dict.fromkeys(gpus))
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {named}Python {platform.python_version()}, "
        f"torch {version('torch')}, transformers {version('transformers')}"
    )


def markdown(tables: dict[str, Table], differences: dict[str, Table], about: dict[str, Any]) -> str:
    """The page: levels, then differences to the system compared against."""
    table, against = tables["steps"], about["against"]
    names = list(dict.fromkeys(k for row in table.values() for k in row))
    passes = [k for k in names if k.startswith(EVAL + "pass@")]
    strata = [k for k in names if k.startswith((EVAL + "reward_", EVAL + "solved_"))]
    margins = about["margins"]
    lines = [
        f"# {len(table)} systems, seeds {', '.join(map(str, about['seeds']))}",
        "",
        f"{about['steps']} steps; {about['machine']}. The runs took {about['run_hours']} hours.",
        "",
        "A cell is a mean over seeds ± half of its 95 % t-interval. Differences are taken seed by "
        "seed, from the same start. One is bold where its interval excludes 0, without a "
        "correction for the number of differences on the page. Numbers of training are means over "
        "the last tenth of the steps; covariances, over all steps. Clipped by norm is the share of "
        "all steps whose gradient norm, a mean over the step's updates, was above max_grad_norm. "
        "Held-out numbers are those of the evaluation at that step, or on the line between the two "
        "around it. Entropy at equal reward is that of the first step at which the smoothed reward "
        "reaches the height that both runs of a seed reach.",
    ]
    if margins:
        outcomes = {name: f"{name.removeprefix(EVAL)} (±{margins[name]:g})" for name in margins}
        lines += ["", f"## Primary outcomes, minus {against}, with their margins", ""]
        lines += _grid(_decided(differences["steps"], margins), outcomes, str)
    sections = (
        ("Training, at equal steps", LEARNING),
        ("Held out, at equal steps", _named(passes, EVAL)),
        ("Held out by stratum, at equal steps", _named(strata, EVAL)),
        ("Covariance with the log-prob of the response", COVARIANCES),
    )
    for title, columns in sections:
        lines += ["", f"## {title}", "", *_grid(table, columns, _level)]
        if columns is LEARNING:
            columns = LEARNING | {EQUAL_REWARD: EQUAL_REWARD}
        lines += ["", f"Minus {against}:", "", *_grid(differences["steps"], columns, _change)]
    gains = _named([GAIN + k.removeprefix(EVAL) for k in passes], GAIN)
    lines += ["", "## Rise of pass@k since the start", "", *_grid(table, gains, _change)]
    lines += ["", f"## At equal responses ({about['responses']:.0f} a run)", ""]
    sampled = ", ".join(f"{name} {n:.0f}" for name, n in about["sampled"].items())
    lines += [f"Responses sampled in all steps: {sampled}.", ""]
    both = LEARNING | _named(passes, EVAL)
    lines += _grid(tables["responses"], both, _level)
    lines += ["", f"Minus {against}:", "", *_grid(differences["responses"], both, _change)]
    return "\n".join(lines) + "\n"


def _named(names: Sequence[str], prefix: str) -> dict[str, str]:
    return {name: name.removeprefix(prefix).replace("_", " ") for name in names}


def verdict(x: Interval, margin: float) -> str:
    """What a paired difference decides, given the largest one that does not matter."""
    if x.n < 2:
        return "undecided"
    if -margin < x.low and x.high < margin:
        return "no difference that matters"
    if x.excludes_zero:
        word = "higher" if x.value > 0 else "lower"
        clear = x.low > margin or x.high < -margin
        return f"{word} by more than the margin" if clear else word
    return "undecided"


def _decided(table: Table, margins: Mapping[str, float]) -> dict[str, dict[str, str]]:
    return {
        system: {
            name: f"{verdict(row[name], margin)}: {_change(row[name])}"
            for name, margin in margins.items()
            if name in row
        }
        for system, row in table.items()
    }


def _grid(
    table: Mapping[str, Mapping[str, X]], columns: dict[str, str], text: Callable[[X], str]
) -> list[str]:
    """A Markdown table; a number that a system does not have is a dash."""
    if not columns:
        return ["No held-out number of this kind."]
    lines = [f"| | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for system, row in table.items():
        cells = [text(row[name]) if name in row else "-" for name in columns]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    return lines


def _level(x: Interval) -> str:
    return f"{x.value:.3f}" + (f" ± {x.high - x.value:.3f}" if x.n > 1 else "")


def _change(x: Interval) -> str:
    text = f"{x.value:+.3f}" + (f" [{x.low:+.3f}, {x.high:+.3f}]" if x.n > 1 else "")
    return f"**{text}**" if x.excludes_zero else text


def _plain(table: Table) -> dict[str, dict[str, dict[str, float]]]:
    return {
        system: {name: dataclasses.asdict(x) for name, x in row.items()}
        for system, row in table.items()
    }

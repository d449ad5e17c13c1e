"""The numbers of a comparison: per run, over seeds, and paired with the system compared against.

Two views of the same runs:

    steps      every system at the last step that all of them have
    responses  every system at equal numbers of sampled responses: its last step within the total of
               the system that sampled fewest. Differs from "steps" if one resamples (DAPO)

Training numbers are means over the last tenth of the view's steps; covariances and the share of
steps clipped by norm, over all of them. Held-out numbers are those at the view's end, interpolated
between the evaluations around it. Steps without a number, or with nan, are left out of its mean.

Entropy falls as reward rises, so that a system that learns less keeps more of it. "Entropy at equal
reward" therefore compares two runs of one seed where their smoothed mean rewards first reach the
height that both reach.

Intervals are Student's t over seeds, 95 %. Seeds share questions and starting weights, so
differences are taken seed by seed first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from riskpo.config import read_toml
from riskpo.files import SETTINGS, run_dir
from riskpo.metrics.intervals import Interval, t_interval
from riskpo.report.logs import read_records
from riskpo.report.plots import smooth

EVAL = "eval "  # in front of the held-out names, so that reward_4+4 of both kinds can be told apart
EQUAL_REWARD = "entropy at equal reward"  # a difference, never a level
NORM_CLIPPED = "norm_clipped_fraction"  # of all steps: those whose grad_norm is above its bound
GAIN = "gain "  # in front of a held-out number's rise since step 0
BOUND = "max_grad_norm"  # a column of its own, the same at every step
OVER_ALL_STEPS = ("cov_", "corr_", NORM_CLIPPED)
BOOKKEEPING = ("_s", "_low", "_high", BOUND)  # ends of names that are no results


def by_step(
    steps: Sequence[dict[str, Any]],
    evals: Sequence[dict[str, Any]] = (),
    max_grad_norm: float | None = None,
) -> pd.DataFrame:
    """A run as a table: a row per step, 0 for the start; a column per number, nan where not logged.

    Held-out names begin with EVAL. max_grad_norm is the bound that gradients were shortened to.
    """
    rows: dict[int, dict[str, Any]] = {}
    for prefix, records in (("", steps), (EVAL, evals)):
        for record in records:
            numbers = {prefix + k: v for k, v in record.items() if k not in ("kind", "step")}
            rows.setdefault(record["step"], {}).update(numbers)
    run = pd.DataFrame.from_dict(rows, orient="index", dtype=float)
    run = run.reindex(sorted(rows))  # pandas 2 drops a step without a number
    if "cov_mean" in run and "cov_mvar" in run:
        run["cov_gap"] = run["cov_mean"] - run["cov_mvar"]
    if "grad_norm" in run and max_grad_norm is not None:
        norm = run["grad_norm"]
        run[NORM_CLIPPED] = (norm > max_grad_norm).astype(float).where(norm.notna())
    run[BOUND] = max_grad_norm
    return run


def read_run(folder: Path) -> pd.DataFrame:
    """The log of one run as `by_step` has it; ValueError where there is no log, or no step."""
    steps, settings = read_records(folder, "step"), folder / SETTINGS
    if not steps:
        raise ValueError(f"compare: {folder} has no step yet. Let its run finish.")
    bound = read_toml(settings).max_grad_norm if settings.is_file() else None
    return by_step(steps, read_records(folder, "eval"), bound)


Runs = dict[tuple[str, int], pd.DataFrame]  # (system, seed) -> its table, see `by_step`


def load(out: Path, systems: Sequence[str], seeds: Sequence[int]) -> Runs:
    """The runs up to the last step that all of them have; ValueError as `read_run` raises it."""
    runs = {(name, seed): read_run(run_dir(out, name, seed)) for name in systems for seed in seeds}
    common = min(responses(run).index[-1] for run in runs.values())
    return {key: run.loc[:common] for key, run in runs.items()}


def responses(run: pd.DataFrame) -> pd.Series:
    """Responses sampled up to and with each step."""
    return run["sampled_responses"].dropna().cumsum()


def last_step(run: pd.DataFrame, limit: float) -> int:
    """The last step within that many responses."""
    total = responses(run)
    return int(max(total.index[total <= limit], default=0))


def summary(run: pd.DataFrame, step: int) -> pd.Series:
    """The run's numbers as of `step`; see the head of this file."""
    kept = run[[name for name in run if not name.endswith(BOOKKEEPING)]]
    held_out = [name for name in kept if name.startswith(EVAL)]
    seen = kept.drop(columns=held_out).loc[1:step]
    found = seen.tail(max(len(seen) // 10, 1)).mean()
    found.update(seen[[name for name in seen if name.startswith(OVER_ALL_STEPS)]].mean())
    evals = kept[held_out].dropna(how="all")
    at = evaluation(evals, step)
    rise = (at - evals.iloc[0] if len(evals) else at).rename(lambda k: GAIN + k[len(EVAL) :])
    return pd.concat([found, at, rise]).dropna()


def evaluation(evals: pd.DataFrame, step: int) -> pd.Series:
    """The held-out numbers at `step`, on the line between the evaluations on either side of it."""
    return evals.reindex(evals.index.union([step])).interpolate("index").loc[step]


def summaries(runs: Runs, step_of: Callable[[pd.DataFrame], int]) -> pd.DataFrame:
    """A row per (system, seed), a column per number, nan where a run has none."""
    index = pd.MultiIndex.from_tuples(runs, names=["system", "seed"])
    rows = [summary(run, step_of(run)).to_dict() for run in runs.values()]
    return pd.DataFrame(rows, index)


Table = dict[str, dict[str, Interval]]  # system -> name -> over seeds


def over_seeds(rows: pd.DataFrame) -> Table:
    """Every system's numbers over the seeds that have them."""
    return {
        str(system): {n: t_interval(x.dropna()) for n, x in each.items() if x.notna().any()}
        for system, each in rows.groupby("system", sort=False)
    }


def paired(rows: pd.DataFrame, against: str) -> pd.DataFrame:
    """Every other system's numbers minus those of `against` on the same seed."""
    others = rows.drop(against, level="system")
    return others - rows.loc[against].reindex(others.index, level="seed")


def entropy_at_equal_reward(run: pd.DataFrame, other: pd.DataFrame) -> float:
    """Entropy of run minus that of other; nan where a log has no entropy, or not of every step."""
    curves = []
    for each in (run, other):
        if "sampled_entropy" not in each or each.loc[1:, "sampled_entropy"].isna().any():
            return np.nan
        window = max(len(each.loc[1:]) // 15, 1)
        names = ("reward_mean", "sampled_entropy")
        curves.append([smooth(each.loc[1:, name].to_numpy(), window) for name in names])
    height = min(reward.max() for reward, _ in curves)
    ours, theirs = (entropy[np.argmax(reward >= height)] for reward, entropy in curves)
    return float(ours - theirs)

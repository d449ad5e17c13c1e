"""The numbers of a comparison: per run, over seeds, and paired with the system compared against.

Two views of the same runs. "steps": every system at the last step that all of them have.
"responses": every system at the last step up to which it had sampled no more responses than the
thriftiest system did in all; they differ where an algorithm resamples (DAPO). Step numbers are
means over the last tenth of the steps of the view, covariances and the share of steps clipped by
norm over all of them; held-out numbers are those at its end, on the line between the evaluations
around it where there is none.

Entropy falls as reward rises, so that a system that learns less keeps more of it. "Entropy at equal
reward" therefore compares two runs of one seed where their smoothed mean rewards first reach the
height that both reach.

Intervals are Student's t over seeds, 95 %. Seeds share questions and starting weights, so
differences are taken seed by seed first.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from riskpo.config import read_toml
from riskpo.metrics.intervals import Interval, t_interval
from riskpo.report.logs import read_records
from riskpo.report.plots import smooth

OVER_ALL_STEPS = ("cov_", "corr_")
EVAL = "eval "  # in front of the held-out names, so that reward_4+4 of both kinds can be told apart
EQUAL_REWARD = "entropy at equal reward"  # a difference, never a level
NORM_CLIPPED = "norm_clipped_fraction"  # of all steps: those whose grad_norm is above its bound
GAIN = "gain "  # in front of a held-out number's rise since step 0


def run_dir(out: Path, system: str, seed: int) -> Path:
    return out / system / f"seed-{seed}"


@dataclass(frozen=True)
class RunLogs:
    """The records of one run."""

    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    max_grad_norm: float | None = None  # what gradients were shortened to

    @property
    def last_step(self) -> int:
        return max((int(r["step"]) for r in self.steps), default=0)

    def until(self, step: int) -> RunLogs:
        steps, evals = ([r for r in x if r["step"] <= step] for x in (self.steps, self.evals))
        return replace(self, steps=steps, evals=evals)

    def responses(self) -> list[float]:
        """Responses sampled up to and with each step."""
        total, sums = 0.0, []
        for record in self.steps:
            total += record["sampled_responses"]
            sums.append(total)
        return sums


def read_run(folder: Path) -> RunLogs:
    """The logs of one run; ValueError where there is no log."""
    steps, evals = read_records(folder, "step"), read_records(folder, "eval")
    settings = folder / "config.toml"
    bound = read_toml(settings).max_grad_norm if settings.is_file() else None
    return RunLogs(steps, evals, bound)


def load(out: Path, systems: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[int, RunLogs]]:
    """{system: {seed: logs}}, up to the last step that every run has.

    ValueError where a run has not been made.
    """
    runs = {name: {seed: read_run(run_dir(out, name, seed)) for seed in seeds} for name in systems}
    common = min(run.last_step for each in runs.values() for run in each.values())
    return {
        name: {seed: run.until(common) for seed, run in each.items()} for name, each in runs.items()
    }


def budget(runs: dict[str, dict[int, RunLogs]]) -> float:
    """Responses of the run that sampled fewest."""
    return min(run.responses()[-1] for seeds in runs.values() for run in seeds.values())


def last_step(run: RunLogs, responses: float) -> int:
    """The last step within that many responses."""
    within = [r["step"] for r, n in zip(run.steps, run.responses(), strict=True) if n <= responses]
    return int(within[-1]) if within else 0


def summary(run: RunLogs, step: int) -> dict[str, float]:
    """The run's numbers as of `step`; see the head of this file."""
    seen = [r for r in run.steps if r["step"] <= step]
    recent = seen[-max(len(seen) // 10, 1) :]
    found: dict[str, float] = {}
    for name in numbers_of(seen):
        over = seen if name.startswith(OVER_ALL_STEPS) else recent
        values = [r[name] for r in over if name in r]
        if values:
            found[name] = statistics.fmean(values)
    norms = [r["grad_norm"] for r in seen if "grad_norm" in r]
    if norms and run.max_grad_norm is not None:
        found[NORM_CLIPPED] = statistics.fmean(n > run.max_grad_norm for n in norms)
    if "cov_mean" in found and "cov_mvar" in found:
        found["cov_gap"] = found["cov_mean"] - found["cov_mvar"]
    held_out = evaluation(run, step)
    found |= {EVAL + k: v for k, v in held_out.items()}
    found |= {GAIN + k: v - run.evals[0][k] for k, v in held_out.items()}
    return found


def evaluation(run: RunLogs, step: int) -> dict[str, float]:
    """The held-out numbers at `step`, on the line between the evaluations on either side of it."""
    before = [r for r in run.evals if r["step"] <= step]
    after = [r for r in run.evals if r["step"] >= step]
    if not before:
        return {}
    a, b = before[-1], (after or before[-1:])[0]
    way = (step - a["step"]) / max(b["step"] - a["step"], 1)
    return {k: a[k] + way * (b[k] - a[k]) for k in numbers_of([a]) if k in b}


def numbers_of(records: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the numbers in any of the records, times and bookkeeping left out."""
    names = dict.fromkeys(k for r in records for k in r)
    return [
        k for k in names if k not in ("kind", "step") and not k.endswith(("_s", "_low", "_high"))
    ]


Table = dict[str, dict[str, Interval]]  # system -> name -> over seeds


def over_seeds(summaries: dict[str, dict[int, dict[str, float]]]) -> Table:
    """Every system's numbers over the seeds that have them."""
    table: Table = {}
    for system, seeds in summaries.items():
        names = dict.fromkeys(k for s in seeds.values() for k in s)
        table[system] = {
            name: t_interval([s[name] for s in seeds.values() if name in s]) for name in names
        }
    return table


def entropy_at_equal_reward(run: RunLogs, other: RunLogs) -> dict[str, float]:
    """{EQUAL_REWARD: entropy of run minus that of other}; {} where the log has no entropy."""
    if not all("sampled_entropy" in r for r in run.steps + other.steps):
        return {}
    curves = [(_smoothed(r, "reward_mean"), _smoothed(r, "sampled_entropy")) for r in (run, other)]
    height = min(reward.max() for reward, _ in curves)
    ours, theirs = (entropy[np.argmax(reward >= height)] for reward, entropy in curves)
    return {EQUAL_REWARD: float(ours - theirs)}


def _smoothed(run: RunLogs, name: str) -> np.ndarray:
    """A number by step, averaged over a fifteenth of the steps."""
    return smooth(np.array([r[name] for r in run.steps]), max(len(run.steps) // 15, 1))


def paired(summaries: dict[str, dict[int, dict[str, float]]], against: str) -> Table:
    """Every other system's numbers minus those of `against` on the same seed."""
    reference = summaries[against]
    differences = {
        system: {
            seed: {k: v - reference[seed][k] for k, v in numbers.items() if k in reference[seed]}
            for seed, numbers in seeds.items()
        }
        for system, seeds in summaries.items()
        if system != against
    }
    return over_seeds(differences)

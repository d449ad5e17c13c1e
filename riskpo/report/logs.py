"""A run's log: a JSONL file, a line per step on the terminal, and optional trackers."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from riskpo.config import TrainConfig
from riskpo.files import METRICS, NOTES, TEXTS
from riskpo.trainer.checkpoint import set_aside, truncate_log

TEXT_CHARACTERS = 4000  # that are kept of a prompt, a response or a gold
CRASH = "verifier_crash_"  # before the exception's name, in a step's record
LINE = 120  # columns of a step's line
MOSTLY_CUT = 0.5  # a larger share of truncated responses gives a warning


class RunLog:
    """Records go to run_dir/metrics.jsonl, one JSON object per line, flushed at once.

    Every record has "kind" ("step" or "eval") and "step". Names that end in _s are wall-clock
    seconds; all other numbers are the same in two runs of one command on one machine. Texts go to
    run_dir/rollouts.jsonl, see `texts`. A run that resumes after first_step cuts both files back to
    it; a new run, with first_step=0, renames old files.
    """

    def __init__(self, config: TrainConfig, *, first_step: int) -> None:
        self.path = Path(config.run_dir) / METRICS
        self.path.parent.mkdir(parents=True, exist_ok=True)
        texts = self.path.with_name(TEXTS)
        for path in (self.path, texts):
            if first_step:
                truncate_log(path, first_step)
            else:
                set_aside(path)
        self._file = self.path.open("a", encoding="utf-8")
        self._texts = texts.open("a", encoding="utf-8")
        self._notes = self.path.with_name(NOTES).open("a" if first_step else "w", encoding="utf-8")
        self._warned = False
        self._steps = config.steps
        self._console = Console(soft_wrap=True)
        self._accelerator = _trackers(config)
        self._progress: Progress | None = None
        if sys.stdout.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
            self._progress = Progress(*columns, console=self._console)
            self._bar = self._progress.add_task("", total=config.steps, completed=first_step)
            self._progress.start()

    def step(self, step: int, numbers: dict[str, float]) -> None:
        """One optimisation step: written, tracked, and shown as one line."""
        self._write("step", step, numbers)
        self.note(step_line(step, self._steps, numbers))
        if numbers.get("truncated_fraction", 0.0) > MOSTLY_CUT and not self._warned:
            self._warned = True
            self.note(
                f"warning: {numbers['truncated_fraction']:.0%} of this step's responses were cut "
                "at max_response_tokens, before an end\n  token: raise it, or the reward measures "
                f"length. The responses are in {TEXTS}"
            )
        if self._progress is not None:
            self._progress.update(self._bar, completed=step)

    def texts(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Some responses of a step, one object a line, texts cut to TEXT_CHARACTERS."""
        for row in rows:
            short = {k: v[:TEXT_CHARACTERS] if isinstance(v, str) else v for k, v in row.items()}
            self._texts.write(json.dumps({"step": step, **short}) + "\n")
        self._texts.flush()

    def evaluation(self, step: int, numbers: dict[str, float], shown: Sequence[str]) -> None:
        """Held-out numbers after `step` steps (0: before training); `shown` is for the terminal."""
        self._write("eval", step, numbers)
        text = "  ".join(f"{name} {numbers[name]:.3f}" for name in shown)
        self.note(f"held out after step {step}: {text}")

    def note(self, text: str) -> None:
        """A line for people only; kept in run_dir/notes.txt."""
        self._notes.write(text + "\n")
        self._notes.flush()
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._accelerator is not None:
            self._accelerator.end_training()
        self._file.close()
        self._texts.close()
        self._notes.close()

    def _write(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step, **numbers}) + "\n")
        self._file.flush()
        if self._accelerator is not None:
            self._accelerator.log({f"{kind}/{k}": v for k, v in numbers.items()}, step=step)


class SilentLog:
    """The log of all processes but the first: every call does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *given, **named: None


def step_line(step: int, steps: int, numbers: dict[str, float]) -> str:
    """The step in at most LINE columns; a number that the algorithm does not have is left out.

    Where something goes wrong its share or count is added: responses that were cut, that have
    advantage 0, crashes by name; what is least needed makes room for it.
    """
    shown = (
        ("reward_mean", "reward {:.3f}"),
        ("rvar_lower", "tail {:.2f}"),
        ("q_alpha", "q {:.2f}"),
        ("q_beta", "{:.2f}"),
        ("entropy", "entropy {:.3f}"),
        ("divergence", "apart {:.4f}"),
        ("clip_fraction", "clip {:.3f}"),
        ("grad_norm", "grad {:.2g}"),
        ("zero_advantage_fraction", "zero {:.0%}"),
        ("truncated_fraction", "cut {:.0%}"),
        ("skipped_updates", "SKIPPED {:.0f}"),
        *((n, f"CRASH {n[len(CRASH) :][:20]} {{:.0f}}") for n in numbers if n.startswith(CRASH)),
        ("time_s", "{:.2f} s"),
    )
    only_if_any = ("zero_advantage_fraction", "truncated_fraction", "skipped_updates")
    parts = {
        name: text.format(numbers[name])
        for name, text in shown
        if name in numbers and (name not in only_if_any or numbers[name])
    }
    start = f"step {step:>{len(str(steps))}}/{steps}"
    for spare in ("", "q_beta", "q_alpha", "clip_fraction", "rvar_lower", "entropy"):
        parts.pop(spare, None)
        line = "  ".join([start, *parts.values()])
        if len(line) <= LINE:
            break
    return line[:LINE]


def read_records(run_dir: str | Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind, in the order of their steps."""
    path = Path(run_dir) / METRICS
    if not path.is_file():
        raise ValueError(f"log: there is no {path}. Give the run_dir of a `riskpo train` run.")
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["kind"] == kind]


def average_name(evaluations: Sequence[dict[str, Any]]) -> str | None:
    """avg@n, the name under which held-out mean rewards are logged; None without an evaluation."""
    names = (k for r in evaluations for k in r if k.startswith("avg@") and k[4:].isdigit())
    return next(names, None)


def _trackers(config: TrainConfig) -> Accelerator | None:
    if not config.log_with:
        return None
    accelerator = Accelerator(log_with=list(config.log_with), project_dir=config.run_dir, cpu=True)
    settings = dataclasses.asdict(config).items()
    plain = {k: x if isinstance(x, (int, float, str)) else str(x) for k, x in settings}
    accelerator.init_trackers("riskpo", config=plain)
    return accelerator

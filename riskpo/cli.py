"""`riskpo train | eval | plot`; also `python -m riskpo`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import tyro

from riskpo.config import ColumnsConfig, TrainConfig, read_toml, resolve, to_toml, validate

USAGE = """riskpo: risk-averse policy optimisation of language models

  riskpo train [--config FILE.toml] [--print-config] [--SETTING VALUE ...]
      with no arguments: the embedded demo, a few minutes on two CPU cores
      the same command resumes a run that was interrupted
  riskpo eval  [--model DIR --data FILE] [--samples N] ...
  riskpo plot  RUN_DIR
  riskpo plan  --model NAME_OR_FOLDER [--context N] [--gpu 24 80 H200]
      memory by term before any weight is loaded, and what each switch buys
  riskpo compare [CONFIG.toml] --algorithms A,B+SETTING=VALUE --seeds 0-4 [--jobs 2]
      systems side by side on equal starts and budgets: a table and a picture
  riskpo explain RUN_DIR
      what the log says about why the run learns or does not
  riskpo doctor [--against torch|trl|liger|verl] [--report FILE.md]

`riskpo COMMAND --help` lists the settings."""

# A command's module is imported when the command is run: most of them load torch. Each takes the
# arguments after its name; ValueError and ConnectionError become one line and exit status 2.
COMMANDS = {
    "train": "riskpo.cli:train_command",
    "eval": "riskpo.cli:eval_command",
    "plot": "riskpo.cli:plot_command",
    "plan": "riskpo.memory.plan:plan_command",
    "compare": "riskpo.compare:compare_command",
    "explain": "riskpo.explain:explain_command",
    "doctor": "riskpo.doctor.command:doctor_command",
}


@dataclass(frozen=True)
class EvalConfig:
    """Settings of `riskpo eval`: avg@k, pass@k and maj@k of a model or of a checkpoint folder."""

    # folder or hub name; a run_dir stands for its newest checkpoint; {seed} for each of the seeds
    model: str = "runs/demo"
    data: str | None = None  # as of `riskpo train`; of an embedded task the held-out questions
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    reward: str = "auto"
    questions: int = 200
    samples: int = 8
    ks: tuple[int, ...] = (1, 8)  # of pass@k and maj@k
    temperature: float = 1.0
    max_prompt_tokens: int = 512
    max_response_tokens: int | None = None  # None: 8 for the embedded task, else 1024
    sample_sequences: int = 512
    dtype: str = "float32"
    seed: int = 0
    seeds: tuple[int, ...] = ()  # repeat with these, and give an interval over them too
    out: str | None = None  # write the result, with every question's rewards, as JSON


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 2 for a mistake of the caller's."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if not given or given[0] not in COMMANDS:
        print(USAGE)
        return 0 if given and given[0] in ("-h", "--help") else 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        module, name = COMMANDS[given[0]].split(":")
        getattr(importlib.import_module(module), name)(given[1:])
    except (ValueError, ConnectionError) as error:
        print(f"riskpo: {error}", file=sys.stderr)
        return 2
    return 0


def train_command(given: list[str]) -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--print-config", action="store_true")
    ours, rest = first.parse_known_args(given)
    base = read_toml(ours.config) if ours.config else TrainConfig()
    config = tyro.cli(TrainConfig, prog="riskpo train", args=rest, default=base)
    if ours.print_config:
        effective, _ = resolve(config)
        validate(effective)
        print(to_toml(effective), end="")
        return
    quiet_loading_bars()
    import torch  # this and transformers take seconds to import

    from riskpo.train import train

    if config.model is None and not torch.cuda.is_available():
        # The embedded model is too small to share: a second thread gains little on idle cores,
        # waits at every barrier on busy ones, and changes the last bits of the sums.
        torch.set_num_threads(1)
    train(config)


def eval_command(given: list[str]) -> None:
    config = tyro.cli(EvalConfig, prog="riskpo eval", args=given)
    quiet_loading_bars()
    from riskpo.offline_eval import evaluate_model

    evaluate_model(config)


def plot_command(given: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="riskpo plot")
    parser.add_argument("run_dir", help="folder of a `riskpo train` run")
    from riskpo.plots import plot

    print(plot(parser.parse_args(given).run_dir))


def quiet_loading_bars() -> None:
    """One bar per checkpoint that is written would break up the lines of the steps."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

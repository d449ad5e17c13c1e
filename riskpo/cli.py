"""`riskpo train | eval | plot`; also `python -m riskpo`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field

import tyro

from riskpo import preflight
from riskpo.config import (
    DTYPES,
    ColumnsConfig,
    TrainConfig,
    check_columns,
    read_toml,
    reject,
    resolve,
    to_toml,
    validate,
)
from riskpo.errors import expected, one_line, refusals_in_one_line

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

`riskpo COMMAND --help` lists the settings. An error is one line; --debug shows its traceback."""

# A command's module is imported when the command is run: most of them load torch. Each takes the
# arguments after its name; errors become one line.
COMMANDS = {
    "train": "riskpo.cli:train_command",
    "eval": "riskpo.cli:eval_command",
    "plot": "riskpo.cli:plot_command",
    "plan": "riskpo.memory.plan:plan_command",
    "compare": "riskpo.compare:compare_command",
    "explain": "riskpo.cli:explain_command",
    "doctor": "riskpo.doctor.command:doctor_command",
}


VERIFIER_SECONDS = 5.0


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
    ks: tuple[int, ...] = ()  # of pass@k and maj@k; none: 1 and samples
    temperature: float = 1.0  # 0: greedy
    max_prompt_tokens: int = 512
    max_response_tokens: int | None = None  # None: 8 for the embedded task, else 1024
    sample_sequences: int = 512
    dtype: str = "float32"
    seed: int = 0
    seeds: tuple[int, ...] = ()  # repeat with these, and give an interval over them too
    out: str | None = None  # write the result, with every question's texts and rewards, as JSON

    def validate(self) -> None:
        """ValueError on anything that cannot be evaluated."""
        least = {
            "questions": 1, "samples": 1, "max_prompt_tokens": 1, "sample_sequences": 1, "seed": 0,
        }  # fmt: skip
        if self.max_response_tokens is not None:
            least["max_response_tokens"] = 1
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                reject(f"{name}={getattr(self, name)}", f"at least {smallest}", f"Set {name}.")
        if not 0 <= self.temperature < float("inf"):
            reject(f"temperature={self.temperature}", "0 (greedy) or above", "Set temperature.")
        if any(not 1 <= k <= self.samples for k in self.ks) or len({*self.ks}) < len(self.ks):
            reject(
                f"ks={list(self.ks)} with samples={self.samples}",
                "different numbers from 1 to samples",
                "Draw more samples or ask for smaller k.",
            )
        if min(self.seeds, default=0) < 0 or len({*self.seeds}) < len(self.seeds):
            reject(f"seeds={list(self.seeds)}", "different numbers from 0", "Set seeds.")
        if self.dtype not in DTYPES:
            reject(f"dtype={self.dtype!r}", f"one of {', '.join(DTYPES)}", "Check the spelling.")
        check_columns(self.columns)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit status 2: a mistake to mend, 1: anything else, 130: interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or os.environ.get("RISKPO_DEBUG", "") not in ("", "0")
    given = [word for word in given if word != "--debug"]
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if not given or given[0] not in COMMANDS:
        print(USAGE)
        if given and given[0] not in ("-h", "--help"):
            print(f"riskpo: there is no command {given[0]!r}.", file=sys.stderr)
        return 0 if given and given[0] in ("-h", "--help") else 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        module, name = COMMANDS[given[0]].split(":")
        if module != __name__ and "torch" not in sys.modules:
            print(f"riskpo {given[0]}: loading PyTorch ...", file=sys.stderr, flush=True)
        getattr(importlib.import_module(module), name)(given[1:])
    except KeyboardInterrupt:
        print("riskpo: interrupted; the same command goes on from what is saved.", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + getattr(signal, "SIGPIPE", 13)
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"riskpo: {one_line(error)}", file=sys.stderr)
        return 2 if expected(error) else 1
    return 0


def train_command(given: list[str]) -> None:
    first = argparse.ArgumentParser(prog="riskpo train", add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.add_argument("--print-config", action="store_true")
    with refusals_in_one_line("riskpo train"):
        ours, rest = first.parse_known_args(given)
    base = read_toml(ours.config) if ours.config else TrainConfig()
    with refusals_in_one_line("riskpo train"):
        config = tyro.cli(TrainConfig, prog="riskpo train", args=rest, default=base)
    effective, _ = resolve(config)
    validate(effective)
    if ours.print_config:
        print(to_toml(effective), end="")
        return
    preflight.check_folder(config.run_dir)
    preflight.check_model(config.model)
    question = preflight.check_data(config.data, config.columns)
    preflight.check_data(config.eval_data, config.columns)
    preflight.say(
        f"riskpo train: {config.algorithm} on {config.data or 'the embedded task'}, run_dir "
        f"{config.run_dir}; loading PyTorch and transformers ..."
    )
    preflight.say(*preflight.try_reward(config.reward, question, config.verifier_seconds))
    quiet_loading_bars()
    import torch  # this and transformers take seconds to import

    from riskpo.train import train

    if config.model is None and not torch.cuda.is_available():
        # The embedded model is too small to share: a second thread gains little on idle cores,
        # waits at every barrier on busy ones, and changes the last bits of the sums.
        torch.set_num_threads(1)
    train(config)


def eval_command(given: list[str]) -> None:
    with refusals_in_one_line("riskpo eval"):
        config = tyro.cli(EvalConfig, prog="riskpo eval", args=given)
    config.validate()
    preflight.check_out(config.out)
    question = preflight.check_data(config.data, config.columns)
    preflight.check_model(config.model)
    preflight.say(f"riskpo eval: {config.model}; loading PyTorch and transformers ...")
    preflight.try_reward(config.reward, question, VERIFIER_SECONDS)
    quiet_loading_bars()
    from riskpo.offline_eval import evaluate_model

    evaluate_model(config)


def plot_command(given: list[str]) -> None:
    run_dir = _run_dir("plot", given)
    from riskpo.plots import plot

    print(plot(run_dir))


def explain_command(given: list[str]) -> None:
    run_dir = _run_dir("explain", given)
    from riskpo.explain import explain, report

    print(report(explain(run_dir)))


def _run_dir(command: str, given: list[str]) -> str:
    """The one argument: a folder with a log in it."""
    parser = argparse.ArgumentParser(prog=f"riskpo {command}")
    parser.add_argument("run_dir", help="folder of a `riskpo train` run")
    with refusals_in_one_line(parser.prog):
        run_dir: str = parser.parse_args(given).run_dir
    preflight.check_log(run_dir)
    preflight.say(f"riskpo {command}: loading libraries ...")
    return run_dir


def quiet_loading_bars() -> None:
    """One bar per checkpoint that is written would break up the lines of the steps."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

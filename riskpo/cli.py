"""The command `riskpo`; also `python -m riskpo`."""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from riskpo import preflight
from riskpo.config import TrainConfig, nearest, read_toml, resolve, to_toml, validate
from riskpo.errors import expected, one_line, refusals_in_one_line
from riskpo.eval_config import VERIFIER_SECONDS, EvalConfig
from riskpo.files import check_folder, check_out
from riskpo.report.progress import quiet_loading_bars

USAGE = """riskpo: risk-averse policy optimisation of language models

  riskpo train [--config FILE.toml] [--print-config] [--SETTING VALUE ...]
      with no arguments: the embedded demo, a few minutes on two CPU cores
      the same command resumes a run that was interrupted
  riskpo eval  [--model DIR --data FILE] [--samples N] ...
      avg@n, pass@k and maj@k of a model or a run's newest checkpoint, with intervals
  riskpo fetch-model smollm2|FILE.gguf [--cache DIR]
      converts a small pretrained model to a Hugging Face folder, once, and prints the folder
  riskpo plan  --model NAME_OR_FOLDER [--context N] [--gpu 24 80 H200]
      memory by term before any weight is loaded, and what each switch saves
  riskpo compare [CONFIG.toml] --algorithms A,B+SETTING=VALUE --seeds 0-4 [--jobs 2]
      trains algorithms on equal starts and budgets: a table and a picture
  riskpo explain RUN_DIR
      why the run learns or does not, read from its log
  riskpo samples RUN_DIR [--step 10-20] [--verdict wrong] [--text WORD]
      prompts, responses, verdicts and rewards
  riskpo report RUN_DIR
      curves, samples, settings, memory in one HTML file; riskpo plot RUN_DIR: the curves alone
  riskpo doctor [--against torch|trl|liger|verl] [--model FOLDER] [--report FILE.md]
      checks the install and the loss's numbers on this machine, or against another library

`riskpo COMMAND --help` lists the settings. An error is one line; --debug shows its traceback."""

TRAIN = """Train a language model with a verifiable reward. The same command resumes a run.

--config FILE.toml reads settings from a file; options on the command line win. --print-config
prints the effective settings as TOML and trains nothing. A group is a table in TOML and
--group.name as an option."""

# command -> "module:function". The module is imported when its command runs. The function gets the
# arguments after the command's name, and checks them before any slow import.
COMMANDS = {
    "train": "riskpo.cli:train_command",
    "eval": "riskpo.cli:eval_command",
    "plan": "riskpo.memory_plan.command:plan_command",
    "compare": "riskpo.compare.launch:compare_command",
    "samples": "riskpo.report.samples:samples_command",
    "fetch-model": "riskpo.model.gguf:fetch_model_command",
    "doctor": "riskpo.doctor.command:doctor_command",
}
# Commands whose only argument is the folder of a run: what to call with it, and their help. They
# print what the function returns.
RUN_COMMANDS = {
    "plot": ("riskpo.report.plots:plot", "Draw a run's curves into a PNG and print its path."),
    "explain": ("riskpo.report.explain:report", "Say why a run learns or does not, from its log."),
    "report": (
        "riskpo.report.run_page:write_report",
        "Write curves, samples, settings and memory of a run into one HTML file.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit status 0: done, 2: a user's mistake, 1: other errors, 130: Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug, given = "--debug" in given, [word for word in given if word != "--debug"]
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for stream in (sys.stdout, sys.stderr):  # flush each line, into a file or a pipe too
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    if not given or given[0] not in COMMANDS | RUN_COMMANDS:
        if given and given[0] not in ("-h", "--help"):
            hint = nearest(given[0], COMMANDS | RUN_COMMANDS, "`riskpo --help` lists them.")
            print(f"riskpo: there is no command {given[0]!r}. {hint}", file=sys.stderr)
            return 2
        print(USAGE)
        return 0 if given else 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if given[0] in RUN_COMMANDS:
            run_command(*given)
        else:
            load(COMMANDS[given[0]])(given[1:])
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
        config = tyro.cli(
            TrainConfig, prog="riskpo train", description=TRAIN, args=rest, default=base
        )
    effective, _ = resolve(config)
    validate(effective)
    preflight.check_algorithm(effective.algorithm)
    preflight.check_teacher(effective)
    if ours.print_config:
        print(to_toml(effective), end="")
        return
    check_folder(config.run_dir)
    preflight.check_model(config.model)
    preflight.check_model(config.teacher)
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
    check_out(config.out)
    preflight.check_split(config.data, config.split)
    question = preflight.check_data(config.data, config.columns)
    preflight.check_model(config.model)
    preflight.say(f"riskpo eval: {config.model}; loading PyTorch and transformers ...")
    preflight.try_reward(config.reward, question, VERIFIER_SECONDS)
    quiet_loading_bars()
    from riskpo.eval import evaluate_model

    evaluate_model(config)


def load(place: str) -> Callable[..., Any]:
    """The function of "module:function"."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def run_command(command: str, *given: str) -> None:
    """One of RUN_COMMANDS, after a look at whether its folder has a log in it."""
    place, about = RUN_COMMANDS[command]
    parser = argparse.ArgumentParser(prog=f"riskpo {command}", description=about)
    parser.add_argument("run_dir", help="folder of a `riskpo train` run")
    with refusals_in_one_line(parser.prog):
        run_dir: str = parser.parse_args(given).run_dir
    preflight.check_log(run_dir)
    preflight.say(f"riskpo {command}: loading libraries ...")
    print(load(place)(run_dir))

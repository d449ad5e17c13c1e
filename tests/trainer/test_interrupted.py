"""Ctrl-C wherever it comes: status 130, no half checkpoint, and the same command ends the run."""

from __future__ import annotations

import json
import pkgutil

import pytest

from riskpo.cli import main
from riskpo.trainer.checkpoint import owned
from tests.toy import save_arithmetic

# (what is interrupted, at which call of it)
PLACES = {
    "loading the model": ("riskpo.run.load_policy_for", 1),
    "the baseline evaluation": ("riskpo.validation.evaluate", 1),
    "sampling": ("riskpo.train.collect", 2),
    "updating": ("riskpo.train.update", 2),
    "saving": ("riskpo.trainer.checkpoint.torch.save", 2),
    "naming a checkpoint": ("riskpo.trainer.checkpoint.flush", 3),
    "the page at the end": ("riskpo.train.write_report", 1),
}


def numbers(folder):
    """The log but for its times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith("_s")} for line in lines]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model, data = save_arithmetic(folder, 20)
    given = (
        f"train --model {model} --data {data} --reward exact --algorithm grpo --steps 2 "
        "--questions-per-step 4 --responses-per-question 2 --max-response-tokens 3 "
        "--eval-questions 4 --eval-samples 1 --save-every-steps 1 --run-dir"
    ).split()
    assert main([*given, str(folder / "whole")]) == 0
    return given, numbers(folder / "whole")


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupted_run_goes_on(place, command, tmp_path, monkeypatch, capsys):
    (given, whole), (target, call) = command, PLACES[place]
    calls, real = iter(range(1, call + 1)), pkgutil.resolve_name(target)
    with monkeypatch.context() as patched:

        def mortal(*args, **kwargs):
            if next(calls, None) == call:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        patched.setattr(target, mortal)
        assert main([*given, str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    with owned(tmp_path):  # nobody holds the folder any more
        assert not list(tmp_path.glob("checkpoints/.unfinished*"))
    assert main([*given, str(tmp_path)]) == 0
    assert numbers(tmp_path) == whole
    assert (tmp_path / "report.html").is_file()

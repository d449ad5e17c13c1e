"""docs/quickstart.md: its commands and programs run, in their order, as they stand there.

In the default suite on a tiny untrained model; with RISKPO_REAL_MODEL on the model of that folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
from pathlib import Path

import pytest

from riskpo.cli import main
from tests.toy import save_byte_model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "quickstart.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\S+\.py)\n")  # first line of a program: its name
ELSEWHERE = ("pip ", "make ", "git ", "python -m venv", ". ")  # what a test does not repeat


def command_lines(block):
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def walk(model, without=()):
    """Every block of the page, in the current folder; what the commands printed, by first words."""
    said = {}
    for kind, block in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if kind == "python":
            named = FILE.match(block)
            assert named, block
            Path(named[1]).write_text(block, encoding="utf-8")
        for line in command_lines(block) if kind == "bash" else []:
            if line.startswith(ELSEWHERE) or "fetch-model" in line:
                continue
            command, _, target = line.partition(" > ")
            words = shlex.split(command.replace("$MODEL", str(model)), comments=True)
            printed = io.StringIO()
            if words[:2] in without:
                continue
            with contextlib.redirect_stdout(printed):
                if words[0] == "python":
                    runpy.run_path(words[1])
                else:
                    assert words[0] == "riskpo" and main(words[1:]) == 0, line
            if target:
                Path(target.strip()).write_text(printed.getvalue(), encoding="utf-8")
            else:
                said[" ".join(words[:2])] = printed.getvalue()
    return said


def check(said):
    run = Path("runs/mine")
    assert len({json.loads(x)["step"] for x in (run / "rollouts.jsonl").open()}) > 3
    assert "curves, samples and settings: runs/mine/report.html" in said["riskpo train"]
    assert "avg@4" in said["riskpo eval"] and json.loads(Path("after.json").read_text())
    assert "reward" in said["riskpo samples"] and "samples" in said["riskpo samples"]
    assert "What happened:" in said["riskpo explain"]
    assert "loss" in said["python use.py"]


def test_the_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # a comparison starts processes that import everything once more; tests/test_compare.py has one
    check(walk(save_byte_model(tmp_path / "model"), without=[["riskpo", "compare"]]))


@pytest.mark.real
@pytest.mark.timeout(3600)  # an hour, for a busy machine
@pytest.mark.skipif(not os.environ.get("RISKPO_REAL_MODEL"), reason="RISKPO_REAL_MODEL is not set")
def test_the_quickstart_runs_on_a_pretrained_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(walk(os.environ["RISKPO_REAL_MODEL"]))
    assert Path("runs/compare/compare.md").read_text().startswith("# 2 systems")
    held = [json.loads(x) for x in Path("runs/mine/metrics.jsonl").open()]
    first, last = (r["avg@2"] for r in held if r["kind"] == "eval")
    assert last > first

"""tools/gpu_session.sh, the one command for a machine with a GPU, rehearsed on this one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs coreutils' timeout")


def session(out, *words, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHON": sys.executable, "OUT": str(out), "DRY": "1", **environment}
    command = ["bash", "tools/gpu_session.sh", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.nightly
def test_the_rehearsal_goes_through_every_step(tmp_path):
    """Few files and few cases, else it is what runs on a GPU: profile, tests, sweep, tables."""
    few = {"TEST_FILES": "tests/core/test_no_host_sync.py"}
    done = session(tmp_path, "--op", "surrogate", "--op", "logits_logprob", **few)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" in (tmp_path / "gpu-tests-marked.log").read_text()
    collected = (tmp_path / "gpu-tests-whole.log").read_text()
    assert "test_no_host_sync.py::" in collected or "tests collected" in collected
    lines = json.loads((tmp_path / "gpu-profile.json").read_text())["lines"]
    assert {"a product, float32 result", "forward"} <= {x["what"] for x in lines}
    assert all(x["measured"] > 0 and x["predicted"] > 0 for x in lines)
    report = json.loads((tmp_path / "gpu-sweep.json").read_text())
    assert report["set"] == "dry" and "marked" in report["note"] and "whole" in report["note"]
    assert {r["op"] for r in report["rows"]} == {"surrogate", "logits_logprob"}
    assert not any(r["failed"] for r in report["rows"])
    table = (tmp_path / "gpu-sweep.md").read_text()
    assert "| riskpo_kernels | torch |" in table and "numbers mean nothing" in table


@pytest.mark.slow
def test_a_phase_can_run_alone_and_the_limit_holds(tmp_path):
    """All but a second is kept for the last case and the tables: nothing is left for the cases."""
    done = session(tmp_path, PHASES="sweep", LIMIT_SECONDS="81", KEEP_SECONDS="80")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.glob("gpu-tests*")) and not list(tmp_path.glob("gpu-profile*"))
    report = json.loads((tmp_path / "gpu-sweep.json").read_text())
    assert report["note"] == "no tests in this run"
    assert report["left_out"] and not report["rows"]


def test_without_a_gpu_it_says_so_at_once(tmp_path):
    done = session(tmp_path, DRY="", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())

"""TRL on a pretrained model (RISKPO_REAL_MODEL): our head and trainer give its numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'riskpo[trl]'")


def measured(model, kind: str) -> dict:
    """A process of its own, whose peak is its own."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "tools.trl_step", str(model), kind],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(3000)
def test_head_and_trainer_give_trls_numbers(real_model, capsys):
    plain = measured(real_model, "plain")
    assert min(plain["grad_norm"]) > 1e-2  # the loss of a first step is 0: its gradient is not
    for kind in ("head", "riskpo"):
        ours = measured(real_model, kind)
        assert ours["completions/mean_length"] == plain["completions/mean_length"]
        assert ours["reward"] == plain["reward"]
        for name in ("loss", "grad_norm", "entropy"):
            assert ours[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-6), name
        a, b = torch.tensor(ours["moved"]), torch.tensor(plain["moved"])
        assert (a - b).norm() < 1e-3 * b.norm()
        assert ours["steps"][0]["mib"] < plain["steps"][0]["mib"]
        show(capsys, ours)
    show(capsys, plain)


def show(capsys, found: dict) -> None:
    with capsys.disabled():
        print(
            f"\n{found['kind']}: loss {found['loss']}, |g| {found['grad_norm']}, {found['steps']}"
        )

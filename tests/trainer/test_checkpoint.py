"""Kill a run without warning, start it again: the result is the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from riskpo.compare.launch import compare_command
from riskpo.config import MemoryConfig, SamplerConfig, TrainConfig
from riskpo.group_advantages import GroupAdvantage, over_std
from riskpo.run import start
from riskpo.trainer.checkpoint import (
    latest_checkpoint,
    owned,
    read_about,
    save_checkpoint,
    set_aside,
    truncate_log,
)
from riskpo.trainer.optimizer import Optimizer
from riskpo.trainer.parallel import ParallelModel
from tests.toy import save_arithmetic, tiny_policy

ROOT = Path(__file__).resolve().parents[2]
# Runs the command line, but dies at the given call of one of the trainer's functions.
DIE = """
import importlib, os, signal, sys
module, name, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
module = importlib.import_module(module)
real = getattr(module, name)
def mortal(*args, **kwargs):
    global calls
    calls -= 1
    result = real(*args, **kwargs)
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(module, name, mortal)
from riskpo.cli import main
sys.exit(main(sys.argv[4:]))
"""


def command(folder: Path, run_dir: str) -> list[str]:
    model, data = folder / "model", folder / "sums.jsonl"
    return (
        f"train --run-dir {folder / run_dir} --model {model} --data {data} --steps 6 "
        "--reward tests.toy_reward:odd_length "
        "--questions-per-step 10 --responses-per-question 4 --updates-per-step 2 "
        "--micro-batch-tokens 128 --max-response-tokens 6 --learning-rate 1e-3 --warmup-steps 3 "
        "--eval-every-steps 2 --eval-questions 6 --eval-samples 2 --save-every-steps 2"
    ).split()


def run(*arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
    return done.returncode


def metrics(run_dir: Path) -> list[dict]:
    """The log without its wall-clock fields."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if not k.endswith("_s")} for x in lines]


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(x / "checkpoints/step_000006/model.safetensors") for x in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path):
    save_arithmetic(tmp_path)
    assert run("-m", "riskpo", *command(tmp_path, "whole")) == 0
    # In the fifth step, after its weights have moved; then again while step 6 is being saved.
    killed = command(tmp_path, "killed")
    assert run("-c", DIE, "riskpo.train", "update", "5", *killed) == -signal.SIGKILL
    assert metrics(tmp_path / "killed")[-1]["step"] == 4
    assert run("-c", DIE, "riskpo.trainer.checkpoint", "flush", "2", *killed) == -signal.SIGKILL
    assert latest_checkpoint(tmp_path / "killed").name == "step_000004"
    assert run("-m", "riskpo", *killed) == 0

    whole, killed_dir = tmp_path / "whole", tmp_path / "killed"
    assert same_weights(whole, killed_dir)
    assert metrics(whole) == metrics(killed_dir)
    steps = [m["step"] for m in metrics(whole) if m["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert all(m["grad_norm"] > 0 for m in metrics(whole) if m["kind"] == "step")
    kept = sorted(x.name for x in (killed_dir / "checkpoints").iterdir())
    assert kept == ["step_000004", "step_000006"]
    changed = [*killed, "--beta", "0.9"]
    done = subprocess.run(
        [sys.executable, "-m", "riskpo", *changed], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "beta: None -> 0.9" in done.stderr


def parts(policy):
    optimizer = Optimizer(
        policy.model.parameters(),
        learning_rate=1e-3,
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=1.0,
    )
    return {
        "parallel": ParallelModel(policy.model),
        "tokenizer": policy.tokenizer,
        "optimizer": optimizer,
        "advantage": GroupAdvantage(over_std),
        "config": TrainConfig(),
    }


def test_last_two_are_kept_and_half_written_ones_removed(tmp_path):
    pieces = parts(tiny_policy())
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step=step, **pieces)
    half = tmp_path / "checkpoints" / ".unfinished_000009"
    half.mkdir()
    assert latest_checkpoint(tmp_path).name == "step_000003"
    assert half.exists()  # whoever only looks
    with owned(tmp_path):
        assert not half.exists()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_log_is_cut_at_the_step_and_at_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"kind": "step", "step": {s}}}\n' for s in (1, 2, 3)) + '{"ki')
    truncate_log(path, 2)
    assert [json.loads(x)["step"] for x in path.read_text().splitlines()] == [1, 2]
    truncate_log(tmp_path / "absent.jsonl", 2)
    set_aside(path)
    assert not path.exists() and (tmp_path / "metrics.previous.jsonl").exists()


# Who owns a folder --------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork")  # torch is imported already


def _hold(folder: Path, pipe: Any) -> None:
    with owned(folder):
        pipe.send("mine")
        pipe.recv()


def holder(folder: Path) -> tuple[Any, Any]:
    """A process that owns `folder`, and the pipe that ends it."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_hold, args=(folder, theirs))
    process.start()
    assert ours.recv() == "mine"
    return process, ours


def test_a_second_run_is_refused_until_the_first_ends_or_is_killed(tmp_path):
    first, _ = holder(tmp_path)
    half = tmp_path / "checkpoints" / ".unfinished_000002"
    half.mkdir(parents=True)
    log = tmp_path / "metrics.jsonl"
    log.write_text("the first one's")
    with pytest.raises(ValueError, match=rf"in use by process {first.pid} on "):
        start(TrainConfig(run_dir=str(tmp_path)))
    with pytest.raises(ValueError, match=rf"in use by process {first.pid} on "):
        compare_command(["--algorithms", "grpo", "--out", str(tmp_path)])
    assert half.exists() and log.read_text() == "the first one's"
    first.kill()
    first.join()
    with owned(tmp_path):
        assert not half.exists()
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"), owned(tmp_path):
            pass
    second, pipe = holder(tmp_path)
    pipe.send("end")
    second.join()
    with owned(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="run_dir: cannot write to .*file/run"):
        start(TrainConfig(run_dir=str(tmp_path / "file" / "run")))


def test_a_start_that_fails_gives_the_folder_back(tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="nowhere"):
            start(TrainConfig(run_dir=str(tmp_path), model="m", data="nowhere.jsonl"))


def _poll(folder: Path, pipe: Any) -> None:
    seen = set()
    pipe.send("polling")
    while not pipe.poll():
        seen.add(latest_checkpoint(folder))
    pipe.send(len(seen))


def test_a_reader_beside_a_run_that_saves_harms_nothing(tmp_path):
    pieces, (ours, theirs) = parts(tiny_policy()), FORK.Pipe()
    reader = FORK.Process(target=_poll, args=(tmp_path, theirs))
    reader.start()
    assert ours.recv() == "polling"
    for step in range(1, 9):
        save_checkpoint(tmp_path, step=step, **pieces)
    ours.send("end")
    assert ours.recv() > 2  # it looked while the run was saving
    reader.join()
    kept = sorted(x.name for x in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_000007", "step_000008"]


# What a resumed run may change ---------------------------------------------------------------


@pytest.mark.parametrize("writer", ["config.json", "model.safetensors", "trainer.pt"])
def test_a_full_disk_leaves_the_previous_checkpoint_and_says_so(tmp_path, writer):
    pieces = parts(tiny_policy())
    for weight in pieces["optimizer"].weights:
        weight.grad = torch.ones_like(weight)
    pieces["optimizer"].step(torch.zeros(()))  # moments, which are the largest file
    folder = save_checkpoint(tmp_path, step=1, **pieces)
    limit = (folder / writer).stat().st_size - 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(
            OSError, match="cannot write step 2 .*last checkpoint is step_000001"
        ) as e:
            save_checkpoint(tmp_path, step=2, **pieces)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(e.value)
    assert [x.name for x in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    save_checkpoint(tmp_path, step=2, **pieces)


def test_what_is_not_mathematics_is_free_and_said_and_relative_paths_are_found(
    tmp_path, monkeypatch
):
    (tmp_path / "model").mkdir()
    (tmp_path / "q.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    pieces = parts(tiny_policy())
    pieces["config"] = saved = TrainConfig(model="model", data="q.jsonl")
    folder = save_checkpoint(tmp_path / "run", step=1, **pieces)
    monkeypatch.chdir("/")
    there = replace(saved, model=str(tmp_path / "model"), data=str(tmp_path / "q.jsonl"))
    said = []
    assert read_about(folder, there, said.append) == 1 and not said
    free = replace(
        there,
        eval_every_steps=7,
        eval_samples=3,
        save_every_steps=1,
        memory=MemoryConfig(checkpointing=True, sharded=True),
    )
    assert read_about(folder, free, said.append) == 1 and not said
    smaller = replace(
        there, micro_batch_tokens=64, backend="torch", sampler=SamplerConfig(sequences=8)
    )
    assert read_about(folder, smaller, said.append) == 1
    (line,) = said
    assert "micro_batch_tokens: None -> 64" in line and "sampler.sequences: 512 -> 8" in line
    for locked in (
        replace(there, temperature=0.5),
        replace(there, memory=MemoryConfig(optimizer="8bit")),
        replace(there, data=str(tmp_path / "other.jsonl")),
    ):
        with pytest.raises(ValueError, match="was started with other settings"):
            read_about(folder, locked)

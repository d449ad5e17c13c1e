"""Two gloo processes train as one does: same data, same losses, one checkpoint for any number.

One run of two processes makes everything that the tests look at; see `worker`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from riskpo.config import MemoryConfig, SamplerConfig, TrainConfig
from riskpo.logs import read_records
from riskpo.ranks import ALONE, Ranks, digest, shared_score
from riskpo.records import Question
from riskpo.train import train
from tests.ranks import on_ranks
from tests.toy import save_arithmetic

STEPS, HALF = 3, 2


def config(folder: Path, name: str, steps: int = STEPS, **changes) -> TrainConfig:
    """DAPO (it samples again), two updates per step, a correction, uneven micro-batches."""
    settings = {
        "run_dir": str(folder / name),
        "algorithm": "dapo",
        "model": str(folder / "model"),
        "data": str(folder / "sums.jsonl"),
        "reward": "tests.toy:odd_length",
        "steps": steps,
        "questions_per_step": 4,
        "responses_per_question": 3,
        "updates_per_step": 2,
        "micro_batch_tokens": 40,
        "max_response_tokens": 6,
        "learning_rate": 3e-3,
        "warmup_steps": 1,
        "eval_every_steps": 0,
        "eval_questions": 3,
        "eval_samples": 2,
        "save_every_steps": 1,
        "sampler": SamplerConfig(correction="tis"),
    }
    return TrainConfig(**settings | changes)


def begun(folder: Path, name: str) -> None:
    """A run folder that holds the first half of the run of one process."""
    shutil.copytree(folder / "alone", folder / name)
    for checkpoint in (folder / name / "checkpoints").iterdir():
        if checkpoint.name != f"step_{HALF:06d}":
            shutil.rmtree(checkpoint)


def worker(rank: int, folder: Path) -> None:
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    train(config(folder, "replicated"))
    sharded = MemoryConfig(sharded=True, checkpointing=True)
    train(config(folder, "sharded", memory=sharded))
    ranks = Ranks.join()
    found = {"first": ranks.first(lambda: rank), "gathered": ranks.gather(rank)}
    for name, call in {
        "raised": lambda: ranks.first(lambda: 1 // 0),
        "disagreed": lambda: ranks.agree("ranks", [torch.tensor([1.0, rank])]),
    }.items():
        with pytest.raises((ZeroDivisionError, RuntimeError)) as caught:
            call()
        found[name] = str(caught.value)
    ranks.agree("constants", {"a": [1.0, "x"], "b": torch.ones(2)})
    (folder / f"rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_arithmetic(folder)
    train(config(folder, "alone"))
    begun(folder, "sharded")  # which two processes then take up
    config_file = folder / "sharded" / "checkpoints" / f"step_{HALF:06d}" / "trainer.json"
    about = json.loads(config_file.read_text())
    about["config"]["memory"]["checkpointing"] = True
    config_file.write_text(json.dumps(about))
    on_ranks(worker, 2, folder)
    return folder


def steps(folder: Path) -> list[dict[str, float]]:
    """The numbers of every step, but for wall-clock seconds."""
    return [
        {k: v for k, v in r.items() if not isinstance(v, str) and not k.endswith("_s")}
        for r in read_records(folder, "step")
    ]


def weights(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


@pytest.mark.parametrize("name", ["replicated", "sharded"])
def test_the_curve_is_that_of_one_process(runs, name):
    alone, shared = steps(runs / "alone"), steps(runs / name)
    assert [r["step"] for r in shared] == [1, 2, 3]  # written once, by one of them
    for ours, theirs in zip(shared, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert max(r["clip_fraction"] for r in shared) > 0 and shared[0]["grad_norm"] > 0
    assert all(r["sampled_questions"] >= 4 for r in shared)
    assert any(r["sampled_questions"] > 4 for r in shared)  # DAPO drew again, on both


@pytest.mark.parametrize("name", ["replicated", "sharded"])
def test_the_weights_are_those_of_one_process(runs, name):
    alone, shared = weights(runs / "alone"), weights(runs / name)
    start = load_file(runs / "model" / "model.safetensors")
    moved = max((alone[k] - start[k]).abs().max() for k in start)
    apart = max((alone[k] - shared[k]).abs().max() for k in alone)
    assert alone.keys() == shared.keys() and moved > 1e-2 and apart < 1e-3 * moved


def test_what_shards_saved_one_process_resumes(runs):
    shutil.copytree(runs / "sharded", runs / "back")
    checkpointing = MemoryConfig(checkpointing=True)
    train(config(runs, "back", STEPS + 1, memory=checkpointing))
    train(config(runs, "alone", STEPS + 1))
    ours, theirs = steps(runs / "back")[-1], steps(runs / "alone")[-1]
    assert ours["step"] == STEPS + 1 and ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_ranks_hear_the_first_and_notice_a_difference(runs):
    for rank in (0, 1):
        found = json.loads((runs / f"rank{rank}.json").read_text())
        assert found["first"] == 0 and found["gathered"] == [0, 1]
        assert "division" in found["raised"]
        assert "ranks differ between the processes" in found["disagreed"]


def test_alone_nothing_is_asked_of_anyone():
    assert ALONE.gather(3) == [3] and ALONE.first(lambda: 4) == 4
    ALONE.agree("anything", object())
    questions = [Question("a", "a", ""), Question("b", "b", "")]

    def score(texts, asked):
        return torch.tensor([float(t) for t in texts]), {"right": len(texts)}

    rewards, counts = shared_score(score, ALONE)(["1", "2", "3", "4"], questions)
    assert rewards.tolist() == [1, 2, 3, 4] and counts == {"right": 4}


def test_a_digest_sees_the_last_bit():
    x = torch.tensor([1.0, 2.0])
    assert digest([x, {"a": 1}]) == digest([x.clone(), {"a": 1}])
    assert digest(x) != digest(torch.nextafter(x, x + 1)) != digest(x.double())

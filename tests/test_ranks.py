"""Two gloo processes train as one does: same data, same losses, one checkpoint for any number.

One run of two processes makes everything that the tests look at; see `worker`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from riskpo.config import MemoryConfig, SamplerConfig, TrainConfig, resolve
from riskpo.distributed import ALONE, Ranks, digest
from riskpo.group_advantages import GroupAdvantage, over_std
from riskpo.memory_plan.peak_meter import PeakMeter
from riskpo.report.logs import read_records
from riskpo.rollout.sampler import shared_judge
from riskpo.run import build_optimizer, load, load_sharded
from riskpo.train import train
from riskpo.trainer.checkpoint import restore, save_checkpoint
from riskpo.trainer.parallel import ParallelModel
from riskpo.types import Question
from tests.ranks import on_ranks
from tests.toy import save_arithmetic, tiny_policy, verdicts_of

STEPS, HALF = 3, 2


def config(folder: Path, name: str, steps: int = STEPS, **changes) -> TrainConfig:
    """DAPO (it samples again), two updates per step, a correction, uneven micro-batches."""
    settings = {
        "run_dir": str(folder / name),
        "algorithm": "dapo",
        "model": str(folder / "model"),
        "data": str(folder / "sums.jsonl"),
        "reward": "tests.toy_reward:odd_length",
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
    found["mib"] = large(rank, folder)
    (folder / f"rank{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def large(rank: int, folder: Path) -> dict[str, float]:
    """How far loading and saving a larger sharded model let this process grow, in MiB."""
    ranks = Ranks.join()
    c = config(folder, "large", model=str(folder / "large-model"), dtype="bfloat16")
    c = replace(resolve(c)[0], memory=MemoryConfig(sharded=True))
    found: dict[str, float] = {}

    @contextmanager
    def measured(name: str) -> Iterator[None]:
        meter = PeakMeter(torch.device("cpu"))
        yield
        found[name] = meter.increase() / 2**20

    with measured("load"):
        policy = load_sharded(ranks, partial(load, c, None, [], [], print))
        parallel = ParallelModel(policy.model, ranks, sharded=True)
    found["weights"] = sum(p.numel() for p in policy.model.parameters()) * 2 / 2**20
    optimizer = build_optimizer(policy, c)
    for i, weight in enumerate(optimizer.weights):
        weight.grad = torch.full_like(weight, 1.0 + i % 3)
    optimizer.step(torch.zeros(()))
    advantage = GroupAdvantage(over_std)
    with measured("save"):
        checkpoint = save_checkpoint(
            folder / "large", step=1, parallel=parallel, tokenizer=policy.tokenizer,
            optimizer=optimizer, advantage=advantage, config=c,
        )  # fmt: skip
    again = build_optimizer(policy, c)
    restore(checkpoint, optimizer=again, advantage=advantage)
    for ours, theirs in zip(again.masters, optimizer.masters, strict=True):
        a, b = again.adamw.state[ours], optimizer.adamw.state[theirs]
        pairs = [(ours, theirs), *((a[k], b[k]) for k in ("exp_avg", "exp_avg_sq"))]
        assert all(x.placements == y.placements for x, y in pairs)
        assert all(torch.equal(x.to_local(), y.to_local()) for x, y in pairs)
        assert a["exp_avg"].to_local().numel() == 0 or a["exp_avg"].to_local().abs().max() > 0
    loaded = load_file(checkpoint / "model.safetensors")
    now = policy.model.state_dict()
    assert now.keys() - loaded.keys() == {"lm_head.weight"}  # tied, so written once
    for name, weight in loaded.items():
        assert torch.equal(weight, now[name].full_tensor()), name
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # for the processes: memory is given back
    save_arithmetic(folder)
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
    policy = tiny_policy(**sizes, num_attention_heads=8, tie_word_embeddings=True)
    policy.model.save_pretrained(folder / "large-model")
    policy.tokenizer.save_pretrained(folder / "large-model")
    train(config(folder, "alone"))
    begun(folder, "sharded")  # which two processes then take up
    config_file = folder / "sharded" / "checkpoints" / f"step_{HALF:06d}" / "trainer.json"
    about = json.loads(config_file.read_text())
    about["config"]["memory"]["checkpointing"] = True
    config_file.write_text(json.dumps(about))
    on_ranks(worker, 2, folder)
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
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


def test_shards_are_whole_on_the_first_rank_alone(runs):
    """Weights of 2 bytes a parameter beside masters and moments of 12."""
    first, second = (json.loads((runs / f"rank{r}.json").read_text())["mib"] for r in (0, 1))
    whole = first["weights"]
    assert whole > 45
    assert second["load"] < 0.9 * whole  # its half, and one layer
    assert first["save"] > 5 * whole and second["save"] < 0.5 * whole


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

    def judge(texts, asked):
        return verdicts_of(map(float, texts))

    verdicts = shared_judge(judge, ALONE)(["1", "2", "3", "4"], questions)
    assert [v.reward for v in verdicts] == [1, 2, 3, 4]


def test_a_digest_sees_the_last_bit():
    x = torch.tensor([1.0, 2.0])
    assert digest([x, {"a": 1}]) == digest([x.clone(), {"a": 1}])
    assert digest(x) != digest(torch.nextafter(x, x + 1)) != digest(x.double())

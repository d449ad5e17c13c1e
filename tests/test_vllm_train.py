"""Whole training runs on the engine of tests/rollout/test_vllm_sampler.py in vLLM's stead."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import riskpo.train
from riskpo.config import MemoryConfig, SamplerConfig, TrainConfig
from riskpo.report.logs import read_records
from riskpo.train import train
from tests.rollout.test_vllm_sampler import Engine, pretend
from tests.toy import save_arithmetic, verdicts_of

WOKEN = ["wake weights", "weights", "reset", "wake kv_cache"]


class Rounding(Engine):
    """Computes coarser than the trainer, as engines do, and notes the weights it wakes up with."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.model.lm_head.register_forward_hook(lambda *given: given[-1].bfloat16().float())
        self.woken_with = []

    def wake_up(self, tags):
        super().wake_up(tags)
        if "kv_cache" in tags:
            self.woken_with.append(weights(self.model))


def weights(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def mismatch(model, rollouts, cap):
    """(KL by k3, share of the sample left by min(r, cap)) of the drawn tokens, from scratch."""
    gaps = []
    for tokens, start, theirs in zip(
        rollouts.tokens, rollouts.prompt_len, rollouts.logprob, strict=True
    ):
        with torch.no_grad():
            z = model(input_ids=tokens[None]).logits[0, start - 1 : -1].log_softmax(-1)
        gaps.append((z.gather(1, tokens[start:, None])[:, 0] - theirs).double())
    gap = torch.cat(gaps)
    w = gap.exp().clamp(max=cap)
    return float((gap.exp() - 1 - gap).mean()), float(w.sum() ** 2 / (len(w) * (w**2).sum()))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """run(name, steps) -> (folder, its engine, the trainer's weights and mismatch by update)."""
    model, data = save_arithmetic(tmp_path)
    real = riskpo.train.update
    # What an untrained model earns about half of the time, and no processes to judge it.
    monkeypatch.setattr(
        "riskpo.rewards.scorer.Scorer.verdicts",
        lambda self, texts, questions: verdicts_of(len(t) % 2.0 for t in texts),
    )

    def run(name, steps):
        engines, updates = [], []

        def llm(**given):
            engines.append(Rounding(**given))
            return engines[0]

        def watched(parallel, head, optimizer, rollouts, *rest):
            expected = mismatch(parallel.model, rollouts, cap=2.0)
            stats = real(parallel, head, optimizer, rollouts, *rest)
            updates.append((weights(parallel.model), expected))
            return stats

        pretend(monkeypatch, LLM=llm, SamplingParams=SimpleNamespace)
        monkeypatch.setattr(riskpo.train, "update", watched)
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # restored afterwards
        config = TrainConfig(
            run_dir=str(tmp_path / name),
            model=str(model),
            data=str(data),
            steps=steps,
            sampler=SamplerConfig(engine="vllm", correction="tis"),
            memory=MemoryConfig(skip_zero_advantage=False),  # the fake counts every response
            updates_per_step=2,
            questions_per_step=10,
            responses_per_question=2,
            max_response_tokens=4,
            learning_rate=1e-3,
            eval_every_steps=2,
            eval_questions=6,
            eval_samples=2,
            save_every_steps=2,
        )
        folder = train(config)
        (engine,) = engines
        return folder, engine, updates

    return run


def test_one_sleep_a_step_and_always_the_weights_of_the_last_update(runs):
    folder, engine, updates = runs("whole", 4)
    first, step, evaluation, answers = (["generate"] for _ in range(4))
    assert engine.calls == [
        "sleep 2",
        *[*WOKEN, *first, *evaluation, *step, "sleep 2"],
        *[*WOKEN, *step, "sleep 2"],
        *[*WOKEN, *evaluation, *step, "sleep 2"],
        *[*WOKEN, *step, "sleep 2"],
        *[*WOKEN, *evaluation, *answers],
        "shutdown",
    ]
    assert len(engine.woken_with) == 5 and len(updates) == 4
    for (trained, _), before, after in zip(
        updates, engine.woken_with[:-1], engine.woken_with[1:], strict=True
    ):
        assert same(after, trained) and not same(after, before)
    assert [r["step"] for r in read_records(folder, "eval")] == [0, 2, 4]
    steps = read_records(folder, "step")
    assert len(steps) == 4
    for record, (_, (kl, ess)) in zip(steps, updates, strict=True):
        assert record["sampler_kl"] == pytest.approx(kl, rel=0.01) and kl > 1e-8
        assert record["sampler_ess"] == pytest.approx(ess, abs=1e-6) and ess < 1
        assert record["sampler_truncated"] == 0 and record["skipped_updates"] == 0

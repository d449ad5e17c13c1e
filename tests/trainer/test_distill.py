"""algorithm="distill": the divergence from a teacher of another width, on what the student says."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import Qwen2ForCausalLM

import riskpo.run
from riskpo.algorithms import STRATEGIES
from riskpo.cli import main
from riskpo.config import RunConfig, TrainConfig
from riskpo.demo import build_model, build_tokenizer
from riskpo.model.isolation import settle_attention
from riskpo.model.teacher import Teacher
from riskpo.report.logs import read_records
from riskpo.train import train
from riskpo_kernels.causal_lm import find_head
from riskpo_kernels.reference.divergence import divergence_of
from tests.conftest import has_triton
from tests.toy import random_rollouts, save_byte_model, tiny_config, tiny_policy
from tests.trainer.test_update import gradients

T = 0.7


def log_probs(model, tokens):
    return (model(input_ids=tokens[None], use_cache=False).logits[0, :-1].double() / T).log_softmax(
        -1
    )


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_the_gradient_is_that_of_plain_pytorch(kind, monkeypatch):
    """A mean over all response tokens, whatever the micro-batches; a head with more rows."""
    student, other = tiny_policy().model, Qwen2ForCausalLM(tiny_config(24, hidden_size=48))
    other.lm_head.weight.data.mul_(20)
    other.requires_grad_(False).eval()
    settle_attention(other, "auto")
    rollouts, loss = random_rollouts(14), STRATEGIES["distill"].loss
    words, total = student.lm_head.weight.shape[0], 0.0
    for tokens, prompt in zip(rollouts.tokens, rollouts.prompt_len, strict=True):
        z = other(input_ids=tokens[None], use_cache=False).logits[0, :-1, :words].double() / T
        pair = log_probs(student, tokens), z.log_softmax(-1)
        total = total + divergence_of(*(x[prompt - 1 :] for x in pair), kind, 0.5).sum()
    (total / sum(map(len, rollouts.logprob))).backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters()}
    teacher = Teacher(other, find_head(other))
    kernels = [(10**6, "triton")] if has_triton() else []
    for budget, backend in ((10**6, "auto"), (20, "auto"), *kernels):
        plan = RunConfig(divergence=kind, temperature=T, micro_batch_tokens=budget, backend=backend)
        zero = torch.zeros(len(rollouts))
        fresh = tiny_policy().model
        found = gradients(fresh, rollouts, zero, loss, plan, monkeypatch, teacher)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in other.parameters())


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """A folder: a model three times as wide as the embedded one; no supervised steps."""
    monkeypatch.setattr(riskpo.run, "warm_start", lambda *args, **kwargs: (0, 0.0))
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, 7, (96, 1, 4))
    model.lm_head.weight.data.mul_(20)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_the_embedded_model_comes_nearer_and_a_resumed_run_goes_on(teacher, tmp_path, capsys):
    given = {"algorithm": "distill", "teacher": teacher, "questions_per_step": 8}
    given |= {"responses_per_question": 1, "learning_rate": 3e-3, "warmup_steps": 0}
    given |= {"eval_every_steps": 0, "eval_questions": 2, "save_every_steps": 2}
    for steps in (2, 4):
        train(TrainConfig(run_dir=str(tmp_path / "run"), steps=steps, **given))
    found = [r["divergence"] for r in read_records(tmp_path / "run", "step")]
    assert len(found) == 4 and found[-1] < 0.8 * found[0]
    assert f"apart {found[0]:.4f}" in capsys.readouterr().out
    assert main(["explain", str(tmp_path / "run")]) == 0


REFUSED = {
    "no teacher": ({"teacher": None}, "algorithm='distill' with teacher=None"),
    "nothing learns": ({"algorithm": "grpo"}, "algorithm='grpo' with teacher="),
    "narrow": ({"sampler.top_p": "0.9"}, "sampler.top_k, top_p or min_p with algorithm='distill'"),
    "correction": ({"sampler.correction": "tis"}, "sampler.correction='tis' with"),
    "clip": ({"clip_high": "0.1"}, "clip_low or clip_high with"),
    "words": ({"teacher": "bytes"}, "words such as .* are other tokens than for the student"),
    "nothing there": ({"teacher": "./nowhere"}, "there is no folder ./nowhere"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, teacher, tmp_path, capsys):
    changes, message = REFUSED[name]
    given = {"algorithm": "distill", "teacher": teacher, "run_dir": str(tmp_path / "run")} | changes
    if given["teacher"] == "bytes":
        given["teacher"] = str(save_byte_model(tmp_path / "bytes"))
    words = [w for k, x in given.items() if x is not None for w in (f"--{k}", x)]
    assert main(["train", *words]) == 2
    assert re.search(message, capsys.readouterr().err)

"""The update against plain PyTorch: packing, denominators, old log-probs, heads, bad steps."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from riskpo.algorithms import LossOptions
from riskpo.config import RunConfig, SamplerConfig
from riskpo.model.packing import denominator, hidden_states, micro_batches, mini_batches, pack
from riskpo.trainer.optimizer import Optimizer
from riskpo.trainer.parallel import ParallelModel
from riskpo.trainer.update import recompute, update
from riskpo_kernels.causal_lm import find_head
from tests.toy import random_rollouts, tiny_policy

CPU = torch.device("cpu")
LOSSES = [
    LossOptions(ratio="sequence", aggregate="sequence-mean"),
    LossOptions(ratio="token", aggregate="sequence-mean"),
    LossOptions(ratio="token", aggregate="token-mean", dual_clip=3.0),
    LossOptions(ratio="token", aggregate="prompt-mean"),
    LossOptions(ratio="token", aggregate="sequence-sum"),
    LossOptions(ratio="token", aggregate="sequence-sum-norm", constant=8.0),
]


@pytest.fixture
def model():
    return tiny_policy().model


def optimizer_of(model, **changes):
    settings = {"learning_rate": 1e-3, "warmup_steps": 0, "weight_decay": 0.0}
    return Optimizer(model.parameters(), max_grad_norm=1e9, **settings | changes)


def gradients(model, rollouts, advantage, loss, plan, monkeypatch, teacher=None):
    """The gradients that an update hands to its optimiser, by name."""
    seen = {}
    optimizer = optimizer_of(model)
    real = optimizer.step

    def step(total):
        seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return real(total)

    monkeypatch.setattr(optimizer, "step", step)
    head = find_head(model)
    update(ParallelModel(model), head, optimizer, rollouts, advantage, loss, plan, teacher)
    return seen


def test_packed_forward_equals_one_by_one(model):
    rollouts = random_rollouts(14)
    batch = pack(rollouts, range(len(rollouts)), CPU)
    packed = hidden_states(model, batch).split(batch.cu_seqlens.diff().tolist())
    for tokens, ours in zip(rollouts.tokens, packed, strict=True):
        alone = model.model(input_ids=tokens[None, :-1], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(ours, alone, rtol=0, atol=1e-5)


def test_recomputed_logprobs_are_those_of_the_logits(model):
    rollouts = random_rollouts(14)
    plan = RunConfig(micro_batch_tokens=20, temperature=0.7)
    parts = micro_batches(rollouts, range(len(rollouts)), 20)
    found = recompute(ParallelModel(model), find_head(model), rollouts, parts, plan)
    for row, (tokens, prompt) in enumerate(zip(rollouts.tokens, rollouts.prompt_len, strict=True)):
        ours = found[row]
        with torch.no_grad():
            z = model(input_ids=tokens[None], use_cache=False).logits[0, :-1] / 0.7
        theirs = log_softmax(z, -1).gather(1, tokens[1:, None])[:, 0]
        torch.testing.assert_close(ours[prompt - 1 :], theirs[prompt - 1 :], rtol=1e-5, atol=1e-5)
        assert (ours[: prompt - 1] == 0).all()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: f"{x.ratio}-{x.aggregate}")
@pytest.mark.parametrize("updates", [1, 2])
def test_micro_batches_add_up_to_one_batch(loss, updates, monkeypatch):
    rollouts, advantage = random_rollouts(14, questions=6), torch.randn(24)
    whole, parts = (
        gradients(
            tiny_policy().model,
            rollouts,
            advantage,
            loss,
            RunConfig(updates_per_step=updates, micro_batch_tokens=budget),
            monkeypatch,
        )
        for budget in (10**6, 17)
    )
    assert whole.keys() == parts.keys() and whole
    for name in whole:
        scale = whole[name].abs().max().clamp(min=1e-8)
        assert ((whole[name] - parts[name]).abs().max() / scale) < 2e-5, name


@pytest.mark.parametrize("loss", LOSSES, ids=lambda x: f"{x.ratio}-{x.aggregate}")
def test_gradient_is_the_policy_gradient(loss, model, monkeypatch):
    """On-policy the gradient is the weighted sum of A * grad log pi, weights by hand."""
    rollouts, advantage = random_rollouts(14), torch.randn(20)
    ours = gradients(
        model, rollouts, advantage, loss, RunConfig(micro_batch_tokens=40), monkeypatch
    )
    model = tiny_policy().model
    tokens = sum(len(x) for x in rollouts.logprob)
    of_question = dict.fromkeys(rollouts.question_id, 0)
    for name, response in zip(rollouts.question_id, rollouts.logprob, strict=True):
        of_question[name] += len(response)
    total = 0.0
    for row, sequence in enumerate(rollouts.tokens):
        prompt_tokens = of_question[rollouts.question_id[row]]
        logprob = log_softmax(model(input_ids=sequence[None]).logits[0, :-1], -1)
        chosen = logprob.gather(1, sequence[1:, None])[rollouts.prompt_len[row] - 1 :, 0]
        weight = {
            "sequence-mean": 1 / (20 * len(chosen)),
            "token-mean": 1 / tokens,
            "prompt-mean": 1 / (len(of_question) * prompt_tokens),
            "sequence-sum": 1 / 20,
            "sequence-sum-norm": 1 / (20 * 8.0),
        }[loss.aggregate]
        total = total - weight * advantage[row] * chosen.sum()
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_on_policy_ratio_is_exactly_one(model):
    numbers = update(
        ParallelModel(model),
        find_head(model),
        optimizer_of(model),
        random_rollouts(14),
        torch.randn(20),
        LOSSES[0],
        RunConfig(),
    )
    assert numbers["ratio_mean"] == 1.0 and numbers["clip_fraction"] == 0.0
    assert numbers["tokens"] == sum(len(x) for x in random_rollouts(14).logprob)


@pytest.mark.parametrize("correction, first_too", [("none", False), ("tis", True)])
def test_what_is_read_before_the_first_step(correction, first_too, model, monkeypatch):
    """Rows of later updates alone, unless a correction has to be known; the mismatch is of all."""
    seen, rollouts = [], random_rollouts(14, questions=4)
    everything, plan = list(range(16)), RunConfig(sampler=SamplerConfig(correction=correction))
    own = recompute(ParallelModel(model), find_head(model), rollouts, [everything], plan)
    for row, x in own.items():
        rollouts.logprob[row] = x[rollouts.prompt_len[row] - 1 :] - (0.5 if row == 2 else 0.1)

    def spy(model, batch):
        seen.append((torch.is_grad_enabled(), batch.rows))
        return hidden_states(model, batch)

    monkeypatch.setattr("riskpo.trainer.update.hidden_states", spy)
    given = (ParallelModel(model), find_head(model), optimizer_of(model), rollouts, torch.ones(16))
    numbers = update(*given, LOSSES[0], replace(plan, updates_per_step=2))
    first, second = everything[:8], everything[8:]
    before = [(False, first), (False, second)] if first_too else [(False, second)]
    assert seen == [*before, (True, first), (True, second)]
    assert numbers["sampler_ratio_max"] == pytest.approx(math.exp(0.5), rel=1e-4)
    gaps = torch.cat(
        [x.new_full(x.shape, 0.5 if row == 2 else 0.1) for row, x in enumerate(rollouts.logprob)]
    )
    assert numbers["sampler_kl"] == pytest.approx(float((gaps.expm1() - gaps).mean()), rel=1e-3)


def test_second_update_is_off_policy_and_clips(model):
    loss = replace(LOSSES[0], clip_low=3e-4, clip_high=4e-4)
    plan = RunConfig(updates_per_step=2)
    rollouts, advantage = random_rollouts(14, questions=4), torch.ones(16)
    numbers = update(
        ParallelModel(model),
        find_head(model),
        optimizer_of(model, learning_rate=1e-2),
        rollouts,
        advantage,
        loss,
        plan,
    )
    assert numbers["ratio_max"] > 1.0004 and 0 < numbers["clip_fraction"] <= 0.5


def test_a_step_that_is_not_finite_is_skipped_loudly(model, caplog):
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = optimizer_of(model)
    advantage = torch.ones(20)
    advantage[3] = float("nan")
    with caplog.at_level(logging.WARNING, "riskpo"):
        numbers = update(
            ParallelModel(model),
            find_head(model),
            optimizer,
            random_rollouts(14),
            advantage,
            LOSSES[2],
            RunConfig(),
        )
    assert numbers["skipped_updates"] == 1 and "skipped" in caplog.text
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_sixteen_bit_weights_move_by_less_than_their_spacing():
    """Ten steps of 1e-4 on weights near one: each alone rounds away in bfloat16."""
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = Optimizer(
        [weight], learning_rate=1e-3, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0
    )
    for _ in range(10):
        weight.grad = torch.ones_like(weight)
        optimizer.step(torch.zeros(()))
    torch.testing.assert_close(optimizer.masters[0].detach(), torch.full((8,), 0.99))
    assert (weight == torch.tensor(0.99, dtype=torch.bfloat16)).all()
    copy = Optimizer(
        [torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))],
        learning_rate=1e-3,
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    copy.load_state_dict(optimizer.state_dict())
    assert torch.equal(copy.masters[0], optimizer.masters[0])


def test_micro_batches_keep_order_and_budget():
    rollouts = random_rollouts(14)
    sizes = [len(x) - 1 for x in rollouts.tokens]
    cuts = micro_batches(rollouts, range(20), 15)
    assert sum(cuts, []) == list(range(20))
    assert all(sum(sizes[i] for i in cut) <= 15 for cut in cuts)
    assert micro_batches(rollouts, [0, 1], 1) == [[0], [1]]  # a longer one stands alone


def test_mini_batches_are_whole_questions():
    rollouts = random_rollouts(14, questions=5)
    parts = mini_batches(rollouts, 2)
    assert sorted(sum(parts, [])) == list(range(20))
    assert [len(p) for p in parts] == [8, 12]
    assert len(mini_batches(rollouts, 9)) == 5


def test_sum_norm_needs_its_constant():
    with pytest.raises(ValueError, match="constant"):
        denominator(random_rollouts(14), [0], "sequence-sum-norm", None)


SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "make, scale, softcap",
    [
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=5.0)), 1.0, 5.0),
        (lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)), 0.25, None),
        (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)), 0.25, None),
    ],
    ids=["gemma2", "cohere", "granite"],
)
def test_heads_of_other_families(make, scale, softcap):
    head = find_head(make())
    assert head.options.scale == scale and head.options.softcap == softcap


def test_a_head_that_does_something_else_is_refused(model):
    model.lm_head.register_forward_hook(lambda module, given, z: z * 0.5 + 1)
    with pytest.raises(ValueError, match="head: got the hook .*lambda.* on lm_head"):
        find_head(model)

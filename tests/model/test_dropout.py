"""The update sees the policy that sampled: no dropout of any kind, or a warning that it differs."""

from __future__ import annotations

import logging

import pytest
import torch

from riskpo.algorithms import LossOptions
from riskpo.config import RunConfig
from riskpo.demo import build_questions
from riskpo.model.dropout import train_without_dropout
from riskpo.model.isolation import plain_row
from riskpo.trainer.optimizer import Optimizer
from riskpo.trainer.parallel import ParallelModel
from riskpo.trainer.rollout_correction import SAMPLER_KL_LIMIT
from riskpo.trainer.update import update
from riskpo_kernels.causal_lm import decoder_of, find_head
from tests.model_families import build, tiny_config
from tests.toy import sample, tiny_policy

FAMILIES = [
    "llama",
    "gpt2",
    "opt",
    "bart",
    "gpt_neox",
    "phi",
    "biogpt",
    "mixtral",
    "granite",
]
LOSS = LossOptions(ratio="token", aggregate="token-mean")


def dropping(family):
    """The family with every kind of dropout that its config names at one half."""
    names = [n for n, x in vars(tiny_config(family)).items() if "drop" in n and type(x) is float]
    assert names
    return build(family, **dict.fromkeys(names, 0.5))


def learned(model):
    """Hidden states of a row and the gradient of a loss of them."""
    row = torch.arange(3, 20)[None]
    hidden = plain_row(decoder_of(model), row)
    wanted = [p for p in decoder_of(model).parameters() if p.requires_grad]
    found = torch.autograd.grad(hidden.square().sum(), wanted, allow_unused=True)
    return [hidden.detach(), *(g for g in found if g is not None)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_dropout_in_any_family(family, checkpointing):
    model = dropping(family)
    expected = learned(model.eval())
    model.train()
    assert any(not torch.equal(x, y) for x, y in zip(learned(model), expected, strict=True))
    if checkpointing and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    train_without_dropout(model)
    for ours, theirs in zip(learned(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def updated(policy, rollouts):
    optimizer = Optimizer(
        policy.model.parameters(),
        learning_rate=0.0,
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    advantage = torch.randn(len(rollouts), generator=torch.Generator().manual_seed(1))
    plan = RunConfig(updates_per_step=2, micro_batch_tokens=60)
    return update(
        ParallelModel(policy.model),
        find_head(policy.model),
        optimizer,
        rollouts,
        advantage,
        LOSS,
        plan,
    )


def drawn(policy):
    settings = {"responses_per_question": 3, "max_prompt_tokens": 40, "max_response_tokens": 8}
    return sample(policy, build_questions(4, 0), stream=(3,), **settings)


def test_the_update_is_of_the_policy_that_sampled(caplog):
    policy = tiny_policy(attention_dropout=0.5)
    with caplog.at_level(logging.WARNING, logger="riskpo"):
        stats = updated(policy, drawn(policy))
    assert stats["sampler_kl"] < 1e-5 and stats["clip_fraction"] == 0
    assert not any("sampler_kl" in r.message for r in caplog.records)


def test_a_sampler_of_other_weights_is_said_once(caplog):
    rollouts, policy = drawn(tiny_policy(seed=1)), tiny_policy(seed=0)
    with caplog.at_level(logging.WARNING, logger="riskpo"):
        kl = [updated(policy, rollouts)["sampler_kl"] for _ in range(2)]
    assert min(kl) > SAMPLER_KL_LIMIT
    said = [r.message for r in caplog.records if "sampler_kl" in r.message]
    assert len(said) == 1
    for cause in ("packed", "dropout", "weights", "chat template", "dtype"):
        assert cause in said[0]

"""Where the optimiser keeps its state: the same numbers in each place, and resume bit for bit."""

from __future__ import annotations

import copy
import importlib.util
import sys

import pytest
import torch

from riskpo.algorithms import LossOptions
from riskpo.config import RunConfig
from riskpo.trainer.optimizer import Optimizer
from riskpo.trainer.parallel import ParallelModel
from riskpo.trainer.update import update
from riskpo_kernels.causal_lm import find_head
from tests.toy import random_rollouts, tiny_policy

LOSS = LossOptions(ratio="token", aggregate="token-mean")


def trained(state, steps=4, dtype=torch.bfloat16, resume_at=None):
    """Weights after a few updates with the optimiser's state in one place or another."""
    model = tiny_policy(hidden_size=128).model.to(dtype)
    settings = {"learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.01, "state": state}
    optimizer = Optimizer(model.parameters(), max_grad_norm=1.0, **settings)
    for step in range(steps):
        if step == resume_at:
            saved, weights = optimizer.state_dict(), model.state_dict()
            model = copy.deepcopy(model)
            model.load_state_dict(copy.deepcopy(weights))
            for p in model.parameters():
                p._post_accumulate_grad_hooks = None
            optimizer = Optimizer(model.parameters(), max_grad_norm=1.0, **settings)
            optimizer.load_state_dict(copy.deepcopy(saved))
        rollouts = random_rollouts(14, seed=step)
        advantage = torch.randn(20, generator=torch.Generator().manual_seed(step))
        update(
            ParallelModel(model),
            find_head(model),
            optimizer,
            rollouts,
            advantage,
            LOSS,
            RunConfig(),
        )
    return model.state_dict(), optimizer


def test_state_on_the_host_changes_no_bit():
    """One micro-batch for each update: with more, the host adds gradients in float32."""
    (device, _), (host, optimizer) = trained("device"), trained("host")
    assert all(m is not w for m, w in zip(optimizer.masters, optimizer.weights, strict=True))
    for name, value in device.items():
        assert torch.equal(value, host[name]), name
    assert all(p.grad is None for p in (*optimizer.weights, *optimizer.masters))


def test_float32_weights_on_the_cpu_are_their_own_masters():
    """There the host is where the state is already: no copy, and no gradient that moves."""
    _, optimizer = trained("host", steps=1, dtype=torch.float32)
    assert all(m is w for m, w in zip(optimizer.masters, optimizer.weights, strict=True))
    assert not any(w._post_accumulate_grad_hooks for w in optimizer.weights)


def test_host_sums_micro_batches_in_float32():
    model = tiny_policy().model.bfloat16()
    weight = next(model.parameters())
    optimizer = Optimizer(
        [weight],
        learning_rate=0.0,
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        state="host",
    )
    for value in (1.0, 2.0**-10):
        (weight.float() * value).sum().backward()
        assert weight.grad is None
    assert (optimizer.masters[0].grad == 1.0 + 2.0**-10).all()  # not a bfloat16 number


@pytest.mark.parametrize("state", ["device", "host"])
def test_resumed_state_changes_no_bit(state):
    (straight, _), (resumed, _) = trained(state), trained(state, resume_at=2)
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="needs bitsandbytes, which the extras test (Linux) and eightbit bring",
)


@needs_bitsandbytes
def test_eight_bit_state_learns_alike_and_resumes():
    (exact, _), (eight, optimizer) = trained("device"), trained("8bit")
    assert any(
        x.dtype == torch.uint8
        for state in optimizer.adamw.state.values()
        for x in state.values()
        if isinstance(x, torch.Tensor)
    )
    start = tiny_policy(hidden_size=128).model.bfloat16().state_dict()
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        moved, other = (x[name].float() - start[name].float() for x in (exact, eight))
        assert (moved - other).norm() < 0.2 * moved.norm(), name
    resumed, _ = trained("8bit", resume_at=2)
    assert all(torch.equal(value, resumed[name]) for name, value in eight.items())


def test_eight_bit_state_says_what_is_missing(monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(ValueError, match="bitsandbytes is not installed"):
        trained("8bit", steps=0)

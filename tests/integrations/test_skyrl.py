"""SkyRL's registry functions, called as SkyRL calls them, through a registry with its signature."""

from __future__ import annotations

import os
import pickle
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from riskpo.integrations import skyrl
from riskpo_kernels import reference

B, T = 8, 6
SETTINGS = {"bundle_size": 2, "seed": 1}
CONFIG = SimpleNamespace(eps_clip_low=3e-4, eps_clip_high=4e-4, off_policy_correction=None)


class Registry:
    """Of skyrl.backends.skyrl_train.utils.ppo_utils.BaseFunctionRegistry, what is used here."""

    def __init__(self):
        self.functions = {}

    def register(self, name, func):
        if name in self.functions:
            raise ValueError(f"'{name}' already registered")
        self.functions[name] = func


@pytest.fixture
def ppo_utils(monkeypatch):
    name = "skyrl.backends.skyrl_train.utils.ppo_utils"
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    module = sys.modules[name]
    module.AdvantageEstimatorRegistry = Registry()
    module.PolicyLossRegistry = Registry()
    return module


def batch(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, 5, 2, 6, 3, 4, 2, 5])
    mask = (torch.arange(T) < lengths[:, None]).float()
    rewards = torch.zeros(B, T)
    rewards[:, 0] = torch.randint(0, 2, (B,), generator=g).float()
    return {
        "token_level_rewards": rewards,
        "response_mask": mask,
        "index": np.array([f"u{i // 2}" for i in range(B)]),
        "values": None,
        "grpo_norm_by_std": True,
        "gamma": 1.0,
        "lambd": 1.0,
        "config": CONFIG,
    }


def test_registered_once_under_one_name(ppo_utils, tmp_path):
    estimator = skyrl.register(tmp_path, **SETTINGS)
    assert ppo_utils.AdvantageEstimatorRegistry.functions == {"riskpo": estimator}
    assert ppo_utils.PolicyLossRegistry.functions == {"riskpo": skyrl.policy_loss}
    with pytest.raises(ValueError, match="already registered"):
        skyrl.register(tmp_path, **SETTINGS)


def test_permuted_rows_give_permuted_advantages(tmp_path):
    given = batch()
    expected, returns = skyrl.Estimator(tmp_path, **SETTINGS)(**given)
    assert torch.equal(expected, returns) and expected.any()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(2))
    moved = given | {
        "token_level_rewards": given["token_level_rewards"][order],
        "response_mask": given["response_mask"][order],
        "index": given["index"][order.numpy()],
    }
    got, _ = skyrl.Estimator(tmp_path, **SETTINGS)(**moved)
    assert torch.equal(got, expected[order])


def test_a_resumed_run_continues_the_uninterrupted_one(tmp_path):
    estimator = skyrl.Estimator(tmp_path, **SETTINGS)
    straight = [estimator(**batch(seed))[0] for seed in range(3)]
    resumed = skyrl.Estimator(tmp_path, resume_batch=2, **SETTINGS)
    assert torch.equal(resumed(**batch(2))[0], straight[2])
    with pytest.raises(ValueError, match="without riskpo_state.json"):
        skyrl.Estimator(tmp_path, resume_batch=7, **SETTINGS)


def test_a_pickled_copy_in_another_process_refuses_to_work(tmp_path, monkeypatch):
    copy = pickle.loads(pickle.dumps(skyrl.Estimator(tmp_path, **SETTINGS)))
    copy(**batch())
    here = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: here + 1)
    with pytest.raises(RuntimeError, match="expected one process"):
        copy(**batch())


def test_prescaled_advantages_give_the_references_sequence_mean():
    """SkyRL's sequence_mean: advantages over (batch size * length) beforehand, then a sum."""
    g = torch.Generator().manual_seed(0)
    mask = batch()["response_mask"]
    old = -torch.rand(B, T, generator=g, dtype=torch.float64)
    new = (old + 1e-3 * torch.randn(B, T, generator=g, dtype=torch.float64)).requires_grad_()
    advantage = torch.randn(B, generator=g, dtype=torch.float64)
    spread = advantage[:, None] * mask / (B * mask.sum(-1, keepdim=True))
    loss, metrics = skyrl.policy_loss(new, old, spread, CONFIG, loss_mask=mask)
    (slope,) = torch.autograd.grad(loss, new)
    expected = reference.clipped_surrogate(new, old, advantage, mask=mask, ratio="sequence")
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.loss, new)[0])
    assert 0 < metrics["clip_ratio"] < 1


def test_off_policy_correction_is_refused():
    config = SimpleNamespace(
        **vars(CONFIG) | {"off_policy_correction": SimpleNamespace(tis_ratio_type="token")}
    )
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="tis_ratio_type"):
        skyrl.policy_loss(x, x, x, config)

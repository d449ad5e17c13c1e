"""SkyRL 0.3.0 itself: its registries, its scaling of advantages, its losses beside ours."""

from __future__ import annotations

import pickle
import sys
import typing

import numpy as np
import pytest
import torch
import typing_extensions

from riskpo.group_advantages import minus_others, over_mean
from riskpo.integrations import skyrl
from tests.integrations.test_skyrl import SETTINGS, B, T, batch

with pytest.MonkeyPatch.context() as patch:
    if sys.version_info < (3, 12):  # pydantic refuses typing's where SkyRL declares its API
        patch.setattr(typing, "TypedDict", typing_extensions.TypedDict)
    host = pytest.importorskip(
        "skyrl.backends.skyrl_train.utils.ppo_utils",
        reason="skyrl does not import here: run make test-hosts",
    )
from skyrl.train.config import AlgorithmConfig  # noqa: E402


@pytest.fixture
def registered(tmp_path):
    yield skyrl.register(tmp_path, **SETTINGS)
    host.AdvantageEstimatorRegistry.unregister("riskpo")
    host.PolicyLossRegistry.unregister("riskpo")


def config(**changes):
    """With the names that docs/hosts.md sets."""
    named = {"advantage_estimator": "riskpo", "policy_loss_type": "riskpo"}
    named |= {"loss_reduction": "sequence_mean", "eps_clip_low": 0.02, "eps_clip_high": 0.03}
    return AlgorithmConfig(**named | changes)


def test_its_registries_hold_ours_and_its_trainers_call_reaches_it(registered):
    made = config()
    assert host.PolicyLossRegistry.get(made.policy_loss_type) is skyrl.policy_loss
    assert host.AdvantageEstimatorRegistry.get(made.advantage_estimator) is registered
    with pytest.raises(ValueError, match="already registered"):
        skyrl.register("elsewhere", **SETTINGS)
    given = batch() | {"config": made, "adv_estimator": made.advantage_estimator}
    advantages, returns = host.compute_advantages_and_returns(**given)
    assert torch.equal(advantages, returns) and advantages.any()
    assert not advantages[given["response_mask"] == 0].any()
    copy = host.cloudpickle.loads(host.cloudpickle.dumps(registered))  # for its other processes
    assert copy.__call__(**batch())[0].any()


def test_after_its_scaling_the_loss_is_its_gspo(registered):
    """Micro-batches of three and five, whose sums are the mean over the mini-batch."""
    g, made = torch.Generator().manual_seed(0), config()
    mask = batch()["response_mask"]
    old = -torch.rand(B, T, generator=g)
    new = (old + 0.05 * torch.randn(B, T, generator=g)).requires_grad_()
    advantages = torch.randn(B, 1, generator=g) * mask
    scaled = host.apply_loss_reduction_to_advantages_minibatch(
        advantages, mask, made.loss_reduction, micro_batch_size=4, max_seq_len=T
    )
    found = {}
    for name, loss in (("ours", skyrl.policy_loss), ("theirs", host.gspo_policy_loss)):
        parts = [
            loss(new[r], old[r], scaled[r], made, loss_mask=mask[r])
            for r in (slice(0, 3), slice(3, B))
        ]
        total = sum(value for value, _ in parts)
        found[name] = total.detach(), torch.autograd.grad(total, new)[0]
        assert all("clip_ratio" in told for _, told in parts)
    for ours, theirs in zip(found["ours"], found["theirs"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert (found["ours"][1][mask != 0] == 0).float().mean() > 0.1, "some are clipped"


@pytest.mark.parametrize(
    "name, value",
    [("tis_ratio_type", "token"), ("sequence_mask_metric", "product")]
    + [
        (f"{kind}_is_threshold_{side}", 0.5)
        for kind in ("outlier_token", "token_mask")
        for side in ("low", "high")
    ],
)
def test_every_correction_that_it_knows_is_refused(name, value):
    made, x = config(), torch.zeros(2, 3)
    setattr(made.off_policy_correction, name, value)
    with pytest.raises(ValueError, match=f"off_policy_correction.{name}"):
        skyrl.policy_loss(x, x, x, made)


def test_normalised_advantages_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="advantage_batch_normalize"):
        skyrl.policy_loss(x, x, x, config(advantage_batch_normalize=True))


@pytest.mark.parametrize("formula, name", [(minus_others, "rloo"), (over_mean, "maxrl")])
def test_the_trainers_formulas_are_its_own(formula, name):
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    given = {"token_level_rewards": rewards.view(16, 1), "response_mask": torch.ones(16, 1)}
    index = np.repeat(np.arange(4), 4)
    theirs, _ = host.AdvantageEstimatorRegistry.get(name)(**given, index=index)
    torch.testing.assert_close(formula(rewards), theirs.view(4, 4), rtol=1e-5, atol=1e-5)


def test_the_loss_survives_its_pickling():
    copy = pickle.loads(host.cloudpickle.dumps(skyrl.policy_loss))
    x = torch.linspace(-1, 0, 6).view(2, 3)
    given = (x, x, torch.ones(2, 3), config())
    assert torch.equal(copy(*given)[0], skyrl.policy_loss(*given)[0])

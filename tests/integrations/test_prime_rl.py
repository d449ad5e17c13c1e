"""prime-rl's custom loss and the bundle buffer, on its documented LossInputs and LossOutputs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from riskpo.integrations import prime_rl
from riskpo_kernels import reference

T = 9


@dataclass
class LossInputs:
    trainer_logprobs: torch.Tensor
    inference_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    loss_weights: torch.Tensor | None = None


@dataclass
class LossOutputs:
    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def prime(monkeypatch):
    parts = ["prime_rl", "trainer", "rl", "loss"]
    for end in range(1, 5):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    sys.modules["prime_rl.trainer.rl.loss"].LossOutputs = LossOutputs


def sequence(seed: int, weights=None) -> LossInputs:
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(T, generator=g, dtype=torch.float64)
    new = old + 5e-4 * torch.randn(T, generator=g, dtype=torch.float64)
    mask = torch.arange(T) >= seed % 4
    advantage = torch.randn(1, generator=g, dtype=torch.float64).expand(T) * mask
    return LossInputs(new.requires_grad_(), old, None, advantage, mask, weights)


def joined(parts: list[LossInputs], aggregate: str) -> torch.Tensor:
    stack = {
        name: torch.stack([getattr(p, name) for p in parts])
        for name in ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask")
    }
    return reference.clipped_surrogate(
        stack["trainer_logprobs"],
        stack["inference_logprobs"],
        stack["advantages"][:, -1],
        mask=stack["loss_mask"],
        ratio="sequence",
        aggregate=aggregate,
    ).loss


@pytest.mark.parametrize("aggregate", ["token-mean", "sequence-mean"])
def test_summed_over_sequences_and_divided_outside_it_is_the_reference(aggregate):
    parts = [sequence(seed) for seed in range(6)]
    tokens = sum(int(p.loss_mask.sum()) for p in parts)
    mean = tokens / len(parts) if aggregate == "sequence-mean" else None
    outs = [prime_rl.riskpo_loss(p, mean_tokens=mean) for p in parts]
    loss = sum(out.loss for out in outs) / tokens
    expected = joined(parts, aggregate)
    torch.testing.assert_close(loss, expected)
    given = [p.trainer_logprobs for p in parts]
    for a, b in zip(
        torch.autograd.grad(loss, given), torch.autograd.grad(expected, given), strict=True
    ):
        torch.testing.assert_close(a, b)
    names = {"riskpo_ratio_mean", "riskpo_clip_fraction", "riskpo_sampler_missing"}
    assert set(outs[0].metrics) == names


def test_loss_weights_scale_the_sequence():
    weights = torch.full((T,), 0.25, dtype=torch.float64)
    whole, weighted = prime_rl.riskpo_loss(sequence(3)), prime_rl.riskpo_loss(sequence(3, weights))
    torch.testing.assert_close(weighted.loss, whole.loss / 4)


def test_a_missing_inference_log_prob_costs_its_token():
    given, shorter = sequence(1), sequence(1)
    given.inference_logprobs[3] = torch.nan
    shorter.loss_mask[3] = False
    got, expected = prime_rl.riskpo_loss(given), prime_rl.riskpo_loss(shorter)
    assert got.metrics["riskpo_sampler_missing"] == 1 and torch.equal(got.loss, expected.loss)
    slopes = [
        torch.autograd.grad(out.loss, x.trainer_logprobs)[0]
        for out, x in ((got, given), (expected, shorter))
    ]
    assert torch.equal(*slopes) and slopes[0].any()
    with pytest.raises(ValueError, match="mean_tokens=0"):
        prime_rl.riskpo_loss(given, mean_tokens=0)


REWARDS = {"a": [1.0, 0.0, 1.0], "b": [0.0, 0.0, 0.0], "c": [1.0, 1.0, 0.0], "d": [0.0, 1.0, 0.0]}


def fill(buffer, names="abcd"):
    return [buffer.add(name, REWARDS[name]) for name in names]


def test_the_buffer_gives_the_references_advantages_when_full_in_any_order():
    settings = {"bundle_size": 2, "seed": 4}
    *early, done = fill(prime_rl.BundleBuffer(4, **settings))
    assert early == [{}, {}, {}]
    names = [name for name in REWARDS for _ in range(3)]
    expected, _ = reference.RiskPOAdvantage("paper", **settings)(
        torch.tensor([r for group in REWARDS.values() for r in group]),
        names,
        step=0,
        draw=[0, 1, 2] * 4,
    )
    flat = [value for name in REWARDS for value in done[name]]
    assert flat == pytest.approx(expected.tolist()) and any(flat)
    assert fill(prime_rl.BundleBuffer(4, **settings), "dbca")[-1] == done


def test_a_restored_buffer_continues():
    settings = {"bundle_size": 2}
    buffer = prime_rl.BundleBuffer(4, **settings)
    fill(buffer)
    state, expected = buffer.state_dict(), fill(buffer)[-1]
    restored = prime_rl.BundleBuffer(4, **settings)
    restored.load_state_dict(state)
    assert fill(restored)[-1] == expected


def test_what_cannot_be_bundled_is_named():
    with pytest.raises(ValueError, match="multiple of bundle_size=5"):
        prime_rl.BundleBuffer(6)
    buffer = prime_rl.BundleBuffer(2, bundle_size=2)
    buffer.add("a", [1.0])
    with pytest.raises(ValueError, match="twice in one batch"):
        buffer.add("a", [1.0])

"""Weights for a sampler that is not the trainer: by hand, and through the update."""

from __future__ import annotations

import math

import pytest
import torch

from riskpo.algorithms import LossOptions
from riskpo.config import RunConfig, SamplerConfig
from riskpo.model.packing import micro_batches
from riskpo.trainer.optimizer import Optimizer
from riskpo.trainer.parallel import ParallelModel
from riskpo.trainer.rollout_correction import (
    correction_weight,
    correction_weights,
    count_mismatch,
    mismatch_numbers,
)
from riskpo.trainer.totals import Totals
from riskpo.trainer.update import recompute, update
from riskpo.types import Rollouts
from riskpo_kernels.causal_lm import find_head
from tests.toy import random_rollouts, tiny_policy


def correcting(correction="none", level="token", cap=2.0):
    return SamplerConfig(correction=correction, level=level, cap=cap)


def totalled(pairs, settings):
    totals = Totals()
    for pair in pairs:
        count_mismatch(totals, settings, *pair)
    return totals


def numbers_of(pairs, settings):
    return mismatch_numbers(totalled(pairs, settings), settings)


TRAINER = torch.tensor([-1.0, -0.5, -2.0])
SAMPLER = TRAINER - torch.tensor([1.0, 0.0, -0.5])  # log r: 1, 0, -0.5
E, ROOT = math.e, math.exp(-0.5)


@pytest.mark.parametrize(
    "correction, expected",
    [
        (correcting("tis", "token", 2.0), [2.0, 1.0, ROOT]),
        (correcting("mis", "token", 2.0), [0.0, 1.0, ROOT]),
        (correcting("tis", "sequence", 2.0), math.exp(0.5)),
        (correcting("tis", "sequence", 1.5), 1.5),
        (correcting("mis", "sequence", 2.0), math.exp(0.5)),
        (correcting("mis", "sequence", 1.5), 0.0),
    ],
)
def test_weights_by_hand(correction, expected):
    weight = correction_weight(correction, TRAINER, SAMPLER)
    torch.testing.assert_close(weight, torch.tensor(expected))


def test_weights_stand_at_their_tokens():
    """Three response tokens after a prompt of three, whose last two inputs have no weight."""
    rollouts = Rollouts(prompt_len=[3], logprob=[SAMPLER])
    trainer = {0: torch.cat([torch.zeros(2), TRAINER])}
    for level, weights in (("token", [2.0, 1.0, ROOT]), ("sequence", [math.exp(0.5)] * 3)):
        totals = Totals()
        found = correction_weights(trainer, rollouts, correcting("tis", level), totals)
        assert found[0].tolist() == pytest.approx([1.0, 1.0, *weights])
        assert totals.sums["gap_tokens"] == 3
    assert correction_weights(trainer, rollouts, correcting(), totals) == {}


def test_an_impossible_token_stays_finite():
    weight = correction_weight(
        correcting("tis", "sequence", 1e12), torch.zeros(3), torch.full((3,), -1e4)
    )
    assert torch.isfinite(weight) and weight == pytest.approx(math.exp(20.0), rel=1e-5)


def test_metrics_by_hand():
    numbers = numbers_of([(TRAINER, SAMPLER)], correcting("tis"))
    k3 = (E - 1 - 1) + 0.0 + (ROOT - 1 + 0.5)
    weights = [2.0, 1.0, ROOT]
    ess = sum(weights) ** 2 / (3 * sum(w * w for w in weights))
    assert numbers == pytest.approx(
        {
            "sampler_kl": k3 / 3,
            "sampler_ratio_max": E,
            "sampler_missing": 0.0,
            "sampler_ess": ess,
            "sampler_truncated": 1 / 3,
        },
        rel=1e-6,
    )
    masked = numbers_of([(TRAINER, SAMPLER)], correcting("mis"))
    assert masked["sampler_masked"] == pytest.approx(1 / 3)
    assert set(numbers_of([(TRAINER, SAMPLER)], correcting())) == {
        "sampler_kl",
        "sampler_ratio_max",
        "sampler_missing",
    }
    assert numbers_of([], correcting("mis"))["sampler_ess"] == 0.0


def test_sums_of_parts_are_the_sums_of_the_whole():
    pairs = [(TRAINER, SAMPLER), (TRAINER[:2], SAMPLER[:2])]
    total, other = (totalled([pair], correcting("mis")) for pair in pairs)
    total.add(other.sums, other.largest)
    whole = totalled(pairs, correcting("mis"))
    assert total.sums == pytest.approx(whole.sums) and total.sums["weights"] == 5
    assert total.largest == pytest.approx(whole.largest) and total.largest


# Through the update ------------------------------------------------------------------------

LOSSES = {
    "token": LossOptions(ratio="token", aggregate="token-mean"),
    "sequence": LossOptions(ratio="sequence", aggregate="sequence-mean"),
}


def updated(rollouts, advantage, correction, loss, updates=1, **settings):
    """(numbers, gradients of the last step) of an update of the same model."""
    model = tiny_policy().model
    optimizer = Optimizer(
        model.parameters(),
        learning_rate=1e-3,
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1e9,
    )
    seen = {}
    real = optimizer.step

    def step(total):
        seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
        return real(total)

    optimizer.step = step
    settings |= {"updates_per_step": updates, "sampler": correction}
    plan = RunConfig(micro_batch_tokens=40, **settings)
    head = find_head(model)
    return update(ParallelModel(model), head, optimizer, rollouts, advantage, loss, plan), seen


def sampled_by_the_trainer(shift=None):
    """Rollouts whose log-probs are the trainer's own, plus `shift` per row."""
    model, rollouts = tiny_policy().model, random_rollouts(14)
    parts = micro_batches(rollouts, range(len(rollouts)), 40)
    own = recompute(ParallelModel(model), find_head(model), rollouts, parts, RunConfig())
    for row, x in own.items():
        exact = x[rollouts.prompt_len[row] - 1 :].clone()
        rollouts.logprob[row] = exact if shift is None else exact + shift[row]
    return rollouts


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["tis", "mis"])
def test_an_identical_sampler_changes_nothing(kind, level, updates):
    rollouts, advantage = sampled_by_the_trainer(), torch.randn(20)
    loss = LOSSES[level]
    plain, without = updated(rollouts, advantage, correcting(), loss, updates)
    numbers, with_it = updated(rollouts, advantage, correcting(kind, level), loss, updates)
    assert numbers["loss"] == pytest.approx(plain["loss"], rel=1e-5, abs=1e-7)
    assert numbers["sampler_ess"] == pytest.approx(1.0, abs=1e-6)
    assert numbers["sampler_ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert numbers["sampler_kl"] < 1e-10
    for name, gradient in without.items():
        torch.testing.assert_close(with_it[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["tis", "mis"])
def test_a_shifted_sampler_weighs_rows_as_by_hand(kind, level, ratio):
    """A constant shift per row makes the weight of a row a number: it scales the advantage."""
    shift = torch.linspace(-1.5, 0.5, 20)
    rollouts, advantage = sampled_by_the_trainer(shift), torch.randn(20)
    lengths = torch.tensor([float(len(x)) for x in rollouts.logprob])
    r = (-shift * (lengths if level == "sequence" else 1.0)).exp()
    weight = r.clamp(max=2.0) if kind == "tis" else r * (r <= 2.0)
    assert 0 < (r > 2.0).sum() < 20
    loss = LOSSES[ratio]
    numbers, ours = updated(rollouts, advantage, correcting(kind, level, 2.0), loss)
    _, by_hand = updated(rollouts, advantage * weight, correcting(), loss)
    assert numbers["ratio_mean"] == 1.0  # the ratio of new to old stays that of the trainer
    for name, gradient in by_hand.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


# A sampler that leaves a log-prob out ------------------------------------------------------


def test_a_missing_log_prob_costs_its_own_unit():
    sampler = torch.where(torch.tensor([False, True, False]), torch.nan, SAMPLER)
    for kind, first in (("tis", 2.0), ("mis", 0.0)):
        each = correction_weight(correcting(kind, "token"), TRAINER, sampler)
        torch.testing.assert_close(each, torch.tensor([first, 0.0, ROOT]))
        assert correction_weight(correcting(kind, "sequence"), TRAINER, sampler) == 0.0
        broken = correction_weight(correcting(kind, "token"), TRAINER * torch.nan, SAMPLER)
        assert broken.isnan().all(), "a NaN of the trainer's own is not hidden"
    k3 = ((E - 1 - 1) + (ROOT - 1 + 0.5)) / 2
    for level, ratio in (("token", E), ("sequence", 0.0)):
        numbers = numbers_of([(TRAINER, sampler)], correcting("tis", level))
        assert numbers["sampler_kl"] == pytest.approx(k3, rel=1e-6)
        assert numbers["sampler_ratio_max"] == pytest.approx(ratio, rel=1e-6)
        assert all(math.isfinite(x) for x in numbers.values())
    nothing = numbers_of([(TRAINER, sampler * torch.nan)], correcting("tis"))
    assert all(math.isfinite(x) for x in nothing.values())


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize(
    "correction", [correcting(), correcting("tis", "token"), correcting("mis", "sequence")]
)
@pytest.mark.parametrize("updates", [1, 2])
def test_an_update_survives_missing_log_probs(correction, ratio, updates, caplog):
    """Nothing is lost without a correction; else the token's, or the response's, weight is 0."""
    whole, advantage = sampled_by_the_trainer(), torch.randn(20)
    holed = sampled_by_the_trainer()
    holed.logprob[3][0] = holed.logprob[7][-1] = torch.nan
    expected, without = updated(whole, advantage, correcting(), LOSSES[ratio], updates)
    with caplog.at_level("WARNING", "riskpo"):
        numbers, gradients = updated(holed, advantage, correction, LOSSES[ratio], updates)
    assert "no log-prob for 2 tokens in 2 of 20 responses" in caplog.text
    assert numbers["sampler_missing"] == 2 and numbers["skipped_updates"] == 0
    assert expected["sampler_missing"] == 0 and all(math.isfinite(x) for x in numbers.values())
    assert numbers["sampler_kl"] == pytest.approx(expected["sampler_kl"], abs=1e-7)
    if correction.level == "sequence":
        left = torch.ones(20)
        left[3] = left[7] = 0.0
        _, without = updated(whole, advantage * left, correcting(), LOSSES[ratio], updates)
    alike = all(torch.allclose(gradients[n], g, 1e-4, 1e-6) for n, g in without.items())
    assert alike == (correction != correcting("tis", "token")), "its own tokens, and only they"

"""top_k, top_p and min_p: the policy that is trained is the one that the sampler drew from."""

from __future__ import annotations

import pytest
import torch
from transformers.generation import logits_process as host

from riskpo.config import RunConfig, SamplerConfig, TrainConfig, validate
from riskpo.demo import build_questions
from riskpo.model.packing import micro_batches, pack
from riskpo.rollout.generate import GenerateSampler
from riskpo.rollout.sampler import SamplingLimits
from riskpo.run import limits_of
from riskpo.trainer.parallel import ParallelModel
from riskpo.trainer.update import recompute
from riskpo.types import Rollouts
from riskpo_kernels.causal_lm import find_head
from tests.conftest import has_triton
from tests.toy import tiny_policy
from tests.trainer.test_mismatch import LOSSES, correcting, updated

NARROW = {
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all three": {"top_k": 4, "top_p": 0.9, "min_p": 0.05},
}


@pytest.mark.parametrize("words", NARROW.values(), ids=NARROW)
def test_the_words_are_those_that_transformers_keeps(words):
    z = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)) * 3
    theirs = z.clone()
    for name, kind in (("top_k", "TopK"), ("top_p", "TopP"), ("min_p", "MinP")):
        if name in words:
            theirs = getattr(host, f"{kind}LogitsWarper")(words[name])(None, theirs)
    kept = SamplingLimits(1, 1, **words).keep(z)
    assert torch.equal(kept, ~theirs.isinf()) and kept.sum(1).unique().numel() + len(words) > 1


def sampled(words, temperature=0.8):
    policy = tiny_policy()
    limits = SamplingLimits(20, 12, temperature, **words)
    rollouts = GenerateSampler(policy, limits).sample(build_questions(5, 0), 4, (0,))
    return policy.model, rollouts


def log_probs(model, rollouts, temperature=0.8):
    """The trainer's, of response tokens, in one row; what the sampler noted."""
    parts = micro_batches(rollouts, range(len(rollouts)), 40)
    settings = RunConfig(temperature=temperature)
    own = recompute(ParallelModel(model), find_head(model), rollouts, parts, settings)
    ours = [own[row][rollouts.prompt_len[row] - 1 :] for row in range(len(rollouts))]
    return torch.cat(ours), torch.cat(rollouts.logprob)


@pytest.mark.parametrize("words", NARROW.values(), ids=NARROW)
def test_the_trainers_log_probs_are_the_samplers(words):
    model, rollouts = sampled(words)
    ours, theirs = log_probs(model, rollouts)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert theirs.lt(-0.1).any()
    if "top_k" in words:
        assert max(int(counts.max()) for _, counts in rollouts.support) <= words["top_k"]
    rollouts.support = []  # over all words it is another policy
    without, _ = log_probs(model, rollouts)
    assert (without - theirs).abs().max() > 0.1 and (without <= theirs + 1e-5).all()


def test_everything_is_kept_where_nothing_is_asked():
    model, rollouts = sampled({})
    assert rollouts.support == []
    assert pack(rollouts, [0, 3], torch.device("cpu")).support is None
    torch.testing.assert_close(*log_probs(model, rollouts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("updates, correction", [(1, "tis"), (2, "tis"), (2, "mis")])
def test_the_first_update_is_on_policy_and_no_weight_is_changed(updates, correction):
    _, rollouts = sampled({"top_k": 3}, temperature=1.0)
    advantage = torch.randn(20, generator=torch.Generator().manual_seed(1))
    numbers, gradients = updated(
        rollouts, advantage, correcting(correction), LOSSES["sequence"], updates
    )
    assert numbers["sampler_kl"] < 1e-9 and numbers["sampler_ess"] == pytest.approx(1, abs=1e-5)
    again, without = updated(rollouts, advantage, correcting(), LOSSES["sequence"], updates)
    for name, gradient in without.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)
    rollouts.support = []
    blind, _ = updated(rollouts, advantage, correcting(correction), LOSSES["sequence"], updates)
    assert blind["sampler_kl"] > 0.01 and blind["sampler_ess"] < 0.99


@pytest.mark.skipif(not has_triton(), reason="needs triton")
def test_the_kernels_train_the_same_policy():
    validate(TrainConfig(sampler=SamplerConfig(top_k=3), backend="triton"))
    some = Rollouts()
    some.extend(sampled({"top_k": 3})[1], range(4))
    advantage = torch.tensor([1.0, -1.0, 0.5, -2.0])
    (numbers, gradients), (exact, truth) = (
        updated(some, advantage, correcting(), LOSSES["sequence"], backend=name)
        for name in ("triton", "torch")
    )
    assert numbers["entropy"] == pytest.approx(exact["entropy"], rel=1e-5)
    for name, gradient in truth.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6)


def test_the_words_follow_their_rows_through_selection_and_packing():
    _, rollouts = sampled({"top_p": 0.7})
    chosen = Rollouts()
    chosen.extend(rollouts, [6, 1])
    ids, offsets = pack(chosen, [1, 0], torch.device("cpu")).support
    places = [rollouts.prompt_len[row] - 1 for row in (1, 6)]
    counts = torch.cat(
        [
            torch.cat([torch.zeros(p).long(), rollouts.support[row][1]])
            for p, row in zip(places, (1, 6), strict=True)
        ]
    )
    assert torch.equal(offsets.diff(), counts)
    assert torch.equal(ids, torch.cat([rollouts.support[row][0] for row in (1, 6)]))
    for row in (1, 6):
        kept, counts = rollouts.support[row]
        response = rollouts.tokens[row][rollouts.prompt_len[row] :]
        assert len(counts) == len(response)
        assert all(t in part for t, part in zip(response, kept.split(counts.tolist()), strict=True))


def test_settings_reach_the_sampler_and_engines_without_the_words_are_refused():
    words = {"top_k": 4, "top_p": 0.9, "min_p": 0.05}
    limits = limits_of(RunConfig(sampler=SamplerConfig(**words)))
    assert {name: getattr(limits, name) for name in words} == words and limits.narrows
    config = TrainConfig(model="m", data="d", sampler=SamplerConfig(engine="vllm", min_p=0.1))
    with pytest.raises(ValueError, match="got sampler.top_k, top_p or min_p with .*generate"):
        validate(config)
    for wrong in ({"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.0}, {"top_k": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            validate(TrainConfig(sampler=SamplerConfig(**wrong)))

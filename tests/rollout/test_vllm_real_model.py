"""vLLM (its CPU build: make test-vllm) on a pretrained model (RISKPO_REAL_MODEL): docs' numbers."""

from __future__ import annotations

import time

import pytest
import torch

from riskpo.rollout.generate import GenerateSampler
from riskpo.rollout.sampler import SamplingLimits
from riskpo.types import Question
from tests.rollout.vllm_rig import gap, policy_logprobs, running, shake

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

ASKED = [f"What is {a} + {b}? Explain." for a in (3, 14, 159) for b in (26, 535)]
QUESTIONS = [Question(x, x, "") for x in ASKED]
LIMITS = SamplingLimits(max_prompt_tokens=60, max_response_tokens=16, temperature=1.0)
EACH = 3  # responses to a question
MEAN = {"float32": 1e-3, "bfloat16": 0.1}  # nats a token between engine and trainer


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: vLLM hands kernels memory that it does not mean to read."""


def rate(sampler) -> float:
    """Tokens a CPU second, after a call in which generate tries the model on its first prompts."""
    sampler.sample(QUESTIONS, EACH, (0, 1))
    began = time.process_time()
    rollouts = sampler.sample(QUESTIONS, EACH, (0, 1))
    return sum(map(len, rollouts.logprob)) / (time.process_time() - began)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("dtype", MEAN)
def test_log_probs_before_and_after_a_large_update(real_model, capsys, dtype):
    with running(str(real_model), dtype, LIMITS) as rig:
        rollouts = rig.sampler.sample(QUESTIONS, EACH, (0, 1))
        before = gap(rig.policy, rollouts, 1.0)
        assert before.mean() < MEAN[dtype]
        assert torch.cat(rollouts.logprob).std() > 0.5  # the softmax is not flat
        theirs, ours = rate(rig.sampler), rate(GenerateSampler(rig.policy, LIMITS))
        rig.sampler.rest()
        shake(rig.policy.model, 0, size=0.1)
        moved = gap(rig.policy, rollouts, 1.0)
        assert moved.mean() > 0.5
        rollouts = rig.sampler.sample(QUESTIONS, EACH, (0, 2))
        after = gap(rig.policy, rollouts, 1.0)
        assert after.mean() < MEAN[dtype]
        u = torch.cat(policy_logprobs(rig.policy, rollouts, 1.0)) - torch.cat(rollouts.logprob)
    kl = float((u.double().expm1() - u).mean())
    with capsys.disabled():
        print(
            f"\n{dtype}: vLLM {theirs:.1f}, generate {ours:.1f} tokens a CPU second; gap mean "
            f"{before.mean():.1e}, max {before.max():.1e}; update {moved.mean():.2f}, then mean "
            f"{after.mean():.1e}, max {after.max():.1e}, KL {kl:.1e}"
        )

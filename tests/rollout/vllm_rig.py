"""vLLM itself, in its CPU build, on small saved models; one engine lives at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from riskpo.model.load import Policy, load_policy
from riskpo.rollout.sampler import SamplingLimits
from riskpo.rollout.vllm import VLLMSampler, start_engine
from riskpo.types import Question, Rollouts
from tests.toy import tiny_policy

# Read by vLLM when it is imported: no compilation, GiB of cache, the engine in this process.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

# Prompts of 5, 8 and 130 tokens; the last fills a block of the cache.
QUESTIONS = [Question(p, p, "") for p in ("1+2=", "012+345=", "9=" * 65)]
PROMPT, RESPONSE = 150, 12  # the limits of `LIMITS`, and so the length of the engine
LIMITS = SamplingLimits(PROMPT, RESPONSE, 0.7)
# vLLM's attention on a CPU wants heads of 32, 64, ... channels.
WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
# Nats in the mean of the tokens, at temperature 0.7 of sharp heads.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 0.1}
BENT = {"top_k": 1, "temperature": 0.1, "repetition_penalty": 5.0, "do_sample": True}


@dataclass
class Rig:
    """A policy, the engine that samples from it, and the folder both were read from."""

    folder: str
    policy: Policy
    engine: Any
    sampler: VLLMSampler


def save_tiny(folder: Path, *, tied: bool = False) -> str:
    """An untrained model with a generation_config that would bend every draw."""
    policy = tiny_policy(**WIDE, tie_word_embeddings=tied)
    if tied:  # a matrix that sharp would copy its input: less of it, and more of the layers
        with torch.no_grad():
            policy.model.lm_head.weight.mul_(3 / 20)
            for name, p in policy.model.named_parameters():
                if name.endswith("_proj.weight"):
                    p.mul_(10)
    policy.model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0, **BENT)
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return str(folder)


@contextmanager
def running(folder: str, dtype: str, limits: SamplingLimits = LIMITS) -> Iterator[Rig]:
    policy = load_policy(folder, dtype=dtype)
    engine = start_engine(
        folder,
        dtype=dtype,
        tokens=limits.max_prompt_tokens + limits.max_response_tokens,
        sequences=32,
        gpu_share=0.3,
        seed=0,
    )
    sampler = VLLMSampler(policy, engine, limits)
    try:
        yield Rig(folder, policy, engine, sampler)
    finally:
        sampler.close()
        assert not torch.distributed.is_initialized()  # the engine's own group ended with it


def policy_logprobs(policy: Policy, rollouts: Rollouts, temperature: float) -> list[torch.Tensor]:
    """Of the drawn tokens, row by row, from the model's plain logits."""
    found = []
    for tokens, start in zip(rollouts.tokens, rollouts.prompt_len, strict=True):
        with torch.no_grad():
            z = policy.model(input_ids=tokens[None]).logits[0, start - 1 : -1].float()
        found.append((z / temperature).log_softmax(-1).gather(1, tokens[start:, None])[:, 0])
    return found


def gap(policy: Policy, rollouts: Rollouts, temperature: float = 0.7) -> torch.Tensor:
    """|engine's log-prob - policy's| of every drawn token."""
    ours = torch.cat(policy_logprobs(policy, rollouts, temperature))
    return (ours - torch.cat(rollouts.logprob)).abs()


def assert_rounding(policy: Policy, rollouts: Rollouts, temperature: float = 0.7) -> None:
    """The engine's log-probs are the policy's, to what its dtype explains."""
    found, most = gap(policy, rollouts, temperature), ROUNDING[policy.model.dtype]
    assert found.mean() < most and found.max() < 50 * most, (found.mean(), found.max())


def shake(model: Any, seed: int, size: float = 0.3) -> None:
    """Change every weight by `size` of its spread, and no less than 1 % of its largest."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = max(float(p.float().std(correction=0)), 0.01 * float(p.float().abs().max()))
            p.add_((torch.randn(p.shape, generator=g) * size * scale).to(p.dtype))

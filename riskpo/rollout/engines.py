"""The sampler that a config names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from riskpo.config import TrainConfig
from riskpo.model.gguf import as_folder
from riskpo.rollout.generate import Policy
from riskpo.rollout.sampler import GenerateSampler, Sampler, SamplingLimits


def sampling_limits(config: TrainConfig) -> SamplingLimits:
    assert config.max_prompt_tokens and config.max_response_tokens  # resolve has seen to it
    return SamplingLimits(config.max_prompt_tokens, config.max_response_tokens, config.temperature)


def build_sampler(
    policy: Policy,
    config: TrainConfig,
    whole: Callable[[], AbstractContextManager[None]] = nullcontext,
    look: Callable[[Callable[[Any], Any]], Any] | None = None,
) -> Sampler:
    """The sampler that config.sampler names.

    Over a model that is sharded, `whole` makes it callable and look(function) is function(model).
    """
    settings, limits = config.sampler, sampling_limits(config)
    if settings.engine == "vllm":
        from riskpo.rollout.vllm import VLLMSampler, check_temperature, start_engine

        assert config.model is not None  # validate has seen to it
        check_temperature(limits.temperature)
        engine = start_engine(
            as_folder(config.model),
            dtype=config.dtype,
            tokens=limits.max_prompt_tokens + limits.max_response_tokens,
            sequences=settings.sequences,
            gpu_share=settings.gpu_share,
            seed=config.seed,
        )
        return VLLMSampler(policy, engine, limits, look=look)
    return GenerateSampler(policy, limits, settings.sequences, settings.static_cache, whole)

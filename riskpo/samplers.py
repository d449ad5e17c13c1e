"""Who samples the responses: transformers here, or a vLLM engine that shares the GPU.

`sample` draws responses from the policy as it is now. `rest` says that the weights are about to
change: what sampling needs is given back, and the next `sample` starts with the new weights.
`close` comes last. Both samplers return the log-probs of the tokens they drew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from riskpo.config import TrainConfig
from riskpo.records import Question, Rollouts
from riskpo.rollout import Policy, Stream, sample


class Sampler(Protocol):
    """Responses to questions; see the module."""

    def sample(self, questions: Sequence[Question], responses: int, stream: Stream) -> Rollouts: ...

    def rest(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class SamplingLimits:
    """What both samplers are bound by; lengths in tokens."""

    max_prompt_tokens: int
    max_response_tokens: int
    temperature: float = 1.0


@dataclass(frozen=True)
class GenerateSampler:
    """transformers' generate on the very weights that are trained: there is nothing to update."""

    policy: Policy
    limits: SamplingLimits
    sequences: int = 512  # responses that are sampled at once
    static_cache: bool = False
    whole: Callable[[], AbstractContextManager[None]] = nullcontext  # around it, if sharded

    def sample(self, questions: Sequence[Question], responses: int, stream: Stream) -> Rollouts:
        with self.whole():
            return sample(
                self.policy,
                questions,
                responses_per_question=responses,
                max_prompt_tokens=self.limits.max_prompt_tokens,
                max_response_tokens=self.limits.max_response_tokens,
                temperature=self.limits.temperature,
                stream=stream,
                batch_sequences=self.sequences,
                static_cache=self.static_cache,
            )

    def rest(self) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to end."""


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
        from riskpo.vllm_sampler import VLLMSampler, check_temperature, start_engine

        assert config.model is not None  # validate has seen to it
        check_temperature(limits.temperature)
        engine = start_engine(
            config.model,
            dtype=config.dtype,
            tokens=limits.max_prompt_tokens + limits.max_response_tokens,
            sequences=settings.sequences,
            gpu_share=settings.gpu_share,
            seed=config.seed,
        )
        return VLLMSampler(policy, engine, limits, look=look)
    return GenerateSampler(policy, limits, settings.sequences, settings.static_cache, whole)

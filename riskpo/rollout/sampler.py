"""Who samples the responses: transformers here, or a vLLM engine that shares the GPU.

`sample` draws responses from the policy as it is now. `rest` says that the weights are about to
change: what sampling needs is given back, and the next `sample` starts with the new weights.
`close` comes last. Both samplers return the log-probs of the tokens they drew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from riskpo.rollout.generate import Policy, sample
from riskpo.types import Question, Rollouts, Stream


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

"""A vLLM engine in the trainer's own process and on its GPU, asleep while the weights change.

Unverified on a GPU: vLLM does not run where this was written. The names used are those of vLLM's
documentation and source, 0.11 to 0.28: LLM, SamplingParams, LLM.generate / sleep / wake_up /
apply_model / reset_prefix_cache. They are called in this order, which the tests check on an engine
of the same surface:

    sample   wake_up(["weights"]), new weights in place, reset_prefix_cache, wake_up(["kv_cache"]),
             generate; a second call before `rest` only generates
    rest     sleep(level=2): weights and key-value cache are dropped, since both will be stale
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from riskpo.lora import plain_weights
from riskpo.records import Question, Rollouts
from riskpo.rollout import (
    Policy,
    Stream,
    append_response,
    end_tokens,
    question_prompts,
    stream_seed,
)
from riskpo.samplers import SamplingLimits

SEEDS = 2**31  # vLLM adds a response's number to the seed of its question


def start_engine(
    model: str, *, dtype: str, tokens: int, sequences: int, gpu_share: float, seed: int
) -> Any:
    """vllm.LLM inside this process, asleep; ValueError says how to install vLLM where it is not.

    tokens     longest prompt plus response
    sequences  responses that are sampled at once
    gpu_share  part of the GPU's memory that the engine may fill while it is awake, 0 to 1
    """
    # In another process the engine could not be handed tensors.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        from vllm import LLM
    except ImportError as error:
        raise ValueError(
            f"sampler: got engine='vllm', which cannot be imported ({error}). Install it with "
            "pip install 'riskpo[vllm]', or set sampler.engine='generate'."
        ) from None
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    engine = LLM(
        model=model,
        dtype=dtype,
        max_model_len=tokens,
        max_num_seqs=sequences,
        gpu_memory_utilization=gpu_share,
        enable_sleep_mode=True,
        # Log-probs of the distribution that is drawn from: after the temperature.
        logprobs_mode="processed_logprobs",
        # Not the model's own top_p, top_k and penalties: they would make it another policy.
        generation_config="vllm",
        seed=seed,
        # One engine per process, which finds the processes' group already made.
        **({"distributed_executor_backend": "external_launcher"} if several else {}),
    )
    engine.sleep(level=2)
    return engine


def sampling_params(**settings: Any) -> Any:
    """vllm.SamplingParams."""
    from vllm import SamplingParams

    return SamplingParams(**settings)


def drawn_logprobs(tokens: Sequence[int], steps: Sequence[Any] | None) -> list[float]:
    """Log-prob of each drawn token, NaN where vLLM gives none: no list, no entry for the step or
    for the token, None, or NaN. ValueError where it gives them for another number of tokens."""
    if steps is None:
        return [math.nan] * len(tokens)
    if len(steps) != len(tokens):
        raise ValueError(
            f"sampler: got {len(steps)} log-probs for {len(tokens)} drawn tokens; expected one "
            "each. Check that the engine's vLLM is a version that riskpo was tried with."
        )
    entries = [(step or {}).get(token) for token, step in zip(tokens, steps, strict=True)]
    given = [None if entry is None else entry.logprob for entry in entries]
    return [math.nan if x is None else float(x) for x in given]


class VLLMSampler:
    """A riskpo.samplers.Sampler on an engine that is asleep, such as start_engine returns."""

    def __init__(
        self,
        policy: Policy,
        engine: Any,
        limits: SamplingLimits,
        params: Callable[..., Any] = sampling_params,
    ) -> None:
        self.policy, self.engine, self.limits, self.params = policy, engine, limits, params
        self.awake = False

    def sample(self, questions: Sequence[Question], responses: int, stream: Stream) -> Rollouts:
        """Every question's responses come from its own seed, a function of `stream` and its id."""
        self._wake()
        tokenizer, ends = self.policy.tokenizer, end_tokens(self.policy)
        prompts = question_prompts(tokenizer, questions, self.limits.max_prompt_tokens)
        answered = self.engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            [self._settings(q, responses, stream, ends) for q in questions],
            use_tqdm=False,
        )
        done = Rollouts()
        for question, prompt, request in zip(questions, prompts, answered, strict=True):
            for answer in sorted(request.outputs, key=lambda output: output.index):
                tokens = list(answer.token_ids)
                logprob = drawn_logprobs(tokens, answer.logprobs)
                append_response(
                    done,
                    tokenizer,
                    question,
                    prompt,
                    torch.tensor(tokens, dtype=torch.int64),
                    torch.tensor(logprob, dtype=torch.float32),
                    ends,
                )
        return done

    def rest(self) -> None:
        """Weights and cache leave the GPU, the policy's weights being the only ones that count."""
        if self.awake:
            self.engine.sleep(level=2)
            self.awake = False

    def _settings(self, question: Question, responses: int, stream: Stream, ends: list[int]) -> Any:
        return self.params(
            n=responses,
            temperature=self.limits.temperature,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            max_tokens=self.limits.max_response_tokens,
            stop_token_ids=ends,
            seed=stream_seed(*stream, question.id) % SEEDS,
            logprobs=0,  # of the drawn token alone
            detokenize=False,
        )

    @torch.no_grad()
    def _wake(self) -> None:
        if self.awake:
            return
        torch.cuda.empty_cache()  # the update's blocks, which the engine may need
        self.engine.wake_up(tags=["weights"])
        self.engine.apply_model(lambda model: len(model.load_weights(self._weights())))
        self.engine.reset_prefix_cache()
        self.engine.wake_up(tags=["kv_cache"])
        self.awake = True

    def _weights(self) -> Any:
        return plain_weights(self.policy.model)

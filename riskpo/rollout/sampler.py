"""The Sampler protocol, and what every sampler shares: prompts in, Rollouts out.

Samplers are in riskpo/rollout/generate.py (transformers) and riskpo/rollout/vllm.py (a vLLM engine
that shares the GPU).

    sample   draw responses from the present policy, with the log-prob of every drawn token
    rest     the weights are about to change: free memory; the next sample uses the new weights
    close    end the sampler
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from riskpo.distributed import Ranks
from riskpo.model.load import Policy
from riskpo.model.positions import check_positions
from riskpo.model.vision import Inputs, question_inputs
from riskpo.rewards.verdict import Judge, Verdict
from riskpo.types import Question, Rollouts, Stream, Support


class Sampler(Protocol):
    """Draws responses to questions; the module's docstring describes the calls."""

    def sample(self, questions: Sequence[Question], responses: int, stream: Stream) -> Rollouts: ...

    def rest(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class SamplingLimits:
    """Limits that every sampler obeys; lengths in tokens."""

    max_prompt_tokens: int
    max_response_tokens: int
    temperature: float = 1.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def narrows(self) -> bool:
        """Whether top_k, top_p or min_p exclude some tokens."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0

    def keep(self, z: torch.Tensor) -> torch.Tensor:
        """bool [B, V]: the tokens of logits [B, V] that may be drawn.

        top_k applies first, then top_p, then min_p, as in transformers' generate. The likeliest
        token is always kept.
        """
        ordered, ids = z.sort(-1, descending=True)
        if self.top_k:
            ordered[:, self.top_k :] = -torch.inf
        p = ordered.softmax(-1)
        kept = (p.cumsum(-1) - p < self.top_p) & (p >= self.min_p * p[:, :1]) & (p > 0)
        return torch.zeros_like(kept).scatter_(1, ids, kept)


@dataclass(frozen=True)
class SharedSampler:
    """A sampler over several processes: each samples its share, all get every response."""

    inner: Sampler
    ranks: Ranks

    def sample(self, questions: Sequence[Question], responses: int, stream: Stream) -> Rollouts:
        size = self.ranks.size
        parts = self.ranks.gather(
            self.inner.sample(questions[self.ranks.rank :: size], responses, stream)
        )
        whole = Rollouts()
        for i in range(len(questions)):
            start = i // size * responses
            whole.extend(parts[i % size], range(start, start + responses))
        return whole

    def rest(self) -> None:
        self.inner.rest()

    def close(self) -> None:
        self.inner.close()


def shared_judge(judge: Judge, ranks: Ranks) -> Judge:
    """A judge over several processes: each judges its share, all get every verdict."""

    def shared(texts: Sequence[str], questions: Sequence[Question]) -> list[Verdict]:
        each = len(texts) // max(len(questions), 1)
        mine = range(ranks.rank, len(questions), ranks.size)
        part = [text for i in mine for text in texts[i * each : (i + 1) * each]]
        parts = ranks.gather(judge(part, [questions[i] for i in mine]) if part else [])
        places = [(i % ranks.size, i // ranks.size * each) for i in range(len(questions))]
        return [verdict for rank, at in places for verdict in parts[rank][at : at + each]]

    return shared


def stream_seed(*parts: int | str) -> int:
    """A seed in [0, 2^62) that is a function of `parts` alone, on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def prompt_tokens(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids of one prompt; the chat template is used where the tokenizer has one."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not isinstance(prompt, str):
        prompt = "\n\n".join(message["content"] for message in prompt) + "\n\n"
    return list(tokenizer(prompt)["input_ids"])


def read_prompts(
    policy: Policy, questions: Sequence[Question]
) -> tuple[list[list[int]], dict[str, Inputs]]:
    """(token ids of every prompt, {question id: further inputs}); {} without a processor."""
    if policy.processor is None:
        return [prompt_tokens(policy.tokenizer, q.prompt) for q in questions], {}
    read = [question_inputs(policy.processor, q) for q in questions]
    return [p for p, _ in read], {q.id: x for q, (_, x) in zip(questions, read, strict=True)}


def prompts_within(
    limits: SamplingLimits, policy: Policy, questions: Sequence[Question]
) -> tuple[list[list[int]], dict[str, Inputs]]:
    """`read_prompts`, checked: ValueError names a question with an empty or too long prompt."""
    prompts, inputs = read_prompts(policy, questions)
    for question, ids in zip(questions, prompts, strict=True):
        if not 0 < len(ids) <= limits.max_prompt_tokens:
            raise ValueError(
                f"sample: question {question.id!r} has {len(ids)} prompt tokens; expected 1 to "
                f"max_prompt_tokens={limits.max_prompt_tokens}. Raise it or drop the question."
            )
    longest = max(map(len, prompts), default=0)
    check_positions(policy.model, longest, limits.max_response_tokens)
    return prompts, inputs


def append_response(
    done: Rollouts,
    tokenizer: Any,
    question: Question,
    prompt: list[int],
    response: list[int],
    logprob: torch.Tensor,
    ends: list[int],
    support: Support | None = None,
) -> None:
    """Append one response to `done`, cut after its first end token; truncated if it has none."""
    end = next((i for i, token in enumerate(response) if token in ends), None)
    tokens = response if end is None else response[: end + 1]
    done.tokens.append(torch.tensor(prompt + tokens))
    done.prompt_len.append(len(prompt))
    done.logprob.append(logprob[: len(tokens)].clone())
    if support is not None:
        ids, counts = support
        counts = counts[: len(tokens)].clone()
        done.support.append((ids[: int(counts.sum())].clone(), counts))
    done.text.append(tokenizer.decode(tokens, skip_special_tokens=True))
    done.truncated.append(end is None)
    done.question_id.append(question.id)

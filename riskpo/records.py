"""The records that travel through the loop. Q questions, G responses each, R = Q * G rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Question:
    """One verifiable question.

    id is stable across runs and unique in a data set; prompt is plain text or a list of chat
    messages {"role", "content"}; gold is the reference answer as text; source names the data set
    (it picks the reward); meta carries anything else a reward may want.
    """

    id: str
    prompt: str | list[dict[str, str]]
    gold: str
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class Rollouts:
    """R sampled responses, question-major: rows i * G .. i * G + G - 1 answer question i.

    tokens      list of R int64 tensors, prompt followed by response (no padding)
    prompt_len  list of R ints
    logprob     list of R float32 tensors, one entry per response token, as the sampler saw them
    text        list of R decoded responses
    truncated   list of R bools: the length limit was hit before an end-of-sequence token
    """

    tokens: list[torch.Tensor]
    prompt_len: list[int]
    logprob: list[torch.Tensor]
    text: list[str]
    truncated: list[bool]
    question_id: list[str]

    def __len__(self) -> int:
        return len(self.tokens)

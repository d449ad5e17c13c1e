"""The records that travel through the loop. Q questions, G responses each, R = Q * G rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # questions are read before torch is
    import torch

Prompt = str | list[dict[str, str]]  # text, or chat messages {"role", "content"}


def texts_of(prompt: Prompt) -> list[str]:
    """[the prompt], or the content of each message."""
    return [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]


@dataclass(frozen=True)
class Question:
    """One verifiable question.

    id      stable across runs, unique in a data set
    gold    the reference answer as text
    source  names the data set; it picks the reward
    meta    further fields of the row, for rewards and statistics
    images  encoded images or paths to them, see riskpo/data/images.py
    """

    id: str
    prompt: Prompt
    gold: str
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    images: tuple[bytes | str, ...] = ()


# (token ids, count for each response token): the tokens that could have been drawn in its place
Support = tuple["torch.Tensor", "torch.Tensor"]


@dataclass
class Rollouts:
    """R sampled responses, question-major: rows i * G .. i * G + G - 1 answer question i.

    tokens      list of R int64 tensors, prompt followed by response (no padding)
    prompt_len  list of R ints
    logprob     list of R float32 tensors, the sampler's log-prob of each response token; NaN where
                the sampler gave none
    support     list of R pairs (ids, counts [response tokens]), int64: the tokens that each
                response token was drawn from, end to end; an empty list if that is the vocabulary
    text        list of R decoded responses
    truncated   list of R bools: the length limit was hit before an end-of-sequence token
    inputs      {question id: a vision-language model's inputs besides input_ids, batch of one};
                empty for text models. See riskpo/model/vision.py
    """

    tokens: list[torch.Tensor] = field(default_factory=list)
    prompt_len: list[int] = field(default_factory=list)
    logprob: list[torch.Tensor] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    support: list[Support] = field(default_factory=list)
    question_id: list[str] = field(default_factory=list)
    inputs: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, other: Rollouts, rows: Sequence[int] | None = None) -> None:
        """Append the chosen rows of `other`, all of them by default."""
        chosen = range(len(other)) if rows is None else rows
        for column in fields(self):
            values = getattr(other, column.name)
            if isinstance(values, list) and values:
                getattr(self, column.name).extend(values[row] for row in chosen)
        names = {other.question_id[row] for row in chosen}
        self.inputs |= {name: x for name, x in other.inputs.items() if name in names}


Stream = tuple[int | str, ...]  # seeds the random numbers of a batch of rollouts

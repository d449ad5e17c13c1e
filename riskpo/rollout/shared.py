"""Sampling and scoring shared among processes: each does its part and is told the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from riskpo.distributed import Ranks
from riskpo.rewards.verdict import Tally, each_of
from riskpo.rollout.sampler import Sampler
from riskpo.types import Question, Rollouts, Score, Stream


@dataclass(frozen=True)
class SharedSampler:
    """A sampler that asks each process for its part of the questions and returns all answers."""

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


def shared_score(score: Score, ranks: Ranks) -> Score:
    """A scorer that judges each answer in one process only, and tells all."""

    def scored(
        texts: Sequence[str], questions: Sequence[Question]
    ) -> tuple[torch.Tensor, dict[str, int]]:
        table = torch.tensor(range(len(texts))).view(max(len(questions), 1), -1)  # [Q, G]
        mine = table[ranks.rank :: ranks.size].flatten().tolist()
        part = None
        if mine:
            part = score([texts[i] for i in mine], questions[ranks.rank :: ranks.size])
        rewards, counts, each = torch.zeros(len(texts)), Counter[str](), [""] * len(texts)
        for rank, found in enumerate(ranks.gather(part)):
            if found is not None:
                places = table[rank :: ranks.size].flatten()
                rewards[places] = found[0].float().cpu()
                counts.update(found[1])
                outcomes = each_of(found[1], rewards[places].tolist())
                for place, outcome in zip(places.tolist(), outcomes, strict=True):
                    each[place] = outcome
        return rewards, Tally(counts, each)

    return scored

"""Several processes, one run: what they tell each other.

Every process draws the same questions, samples and scores its share of them, and is told the rest;
from there on all of them hold the same batch and compute the same advantages. How the model lies
over them, and their gradients: riskpo/trainee.py.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from riskpo.records import Question, Rollouts
from riskpo.rollout import Stream
from riskpo.samplers import Sampler

T = TypeVar("T")
Score = Callable[[Sequence[str], Sequence[Question]], tuple[torch.Tensor, dict[str, int]]]

PATIENCE = timedelta(hours=2)  # one process may check golds, or load, while the others wait


@dataclass(frozen=True)
class Ranks:
    """This process among `size`, of which `local_size` run on this machine; alone by default."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    owns_group: bool = False  # made the group of processes, and so has to end it

    @classmethod
    def join(cls) -> Ranks:
        """The processes that torchrun or accelerate launch started (RANK, WORLD_SIZE, ...)."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        fresh = not dist.is_initialized()
        if fresh:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
        return cls(dist.get_rank(), size, local, fresh)

    def leave(self) -> None:
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Everyone's `value`, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def first(self, make: Callable[[], T]) -> T:
        """What `make` returns, or raises, on the first rank; the others do not call it."""
        if self.size == 1:
            return make()
        said: list[Any] = [None, None]
        if self.is_first:
            try:
                said[0] = make()
            except Exception as error:  # the others would wait for it for ever
                said[1] = error
        dist.broadcast_object_list(said, src=0)
        if said[1] is not None:
            raise said[1]
        return said[0]

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of `x` over the ranks."""
        if self.size == 1:
            return x
        x = x.clone()
        dist.all_reduce(x)
        return x / self.size

    def agree(self, what: str, value: object) -> None:
        """RuntimeError where `value` (numbers, strings, tensors, nested) is not the same on all."""
        if self.size > 1 and len(set(self.gather(digest(value)))) > 1:
            raise RuntimeError(
                f"ranks: {what} differ between the processes; expected the same on all of them. "
                "Start every process with the same command, data files and library versions."
            )


ALONE = Ranks()


def digest(value: object) -> str:
    """A hash of the exact values; dicts by their order."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        value = f"{plain.dtype} {list(plain.shape)} {plain.flatten().tolist()!r}"
    elif isinstance(value, dict):
        value = [f"{key!r}: {digest(inner)}" for key, inner in value.items()]
    elif isinstance(value, (list, tuple)):
        value = [digest(inner) for inner in value]
    return hashlib.sha256(repr(value).encode()).hexdigest()


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
        rewards, counts = torch.zeros(len(texts)), Counter[str]()
        for rank, found in enumerate(ranks.gather(part)):
            if found is not None:
                rewards[table[rank :: ranks.size].flatten()] = found[0].float().cpu()
                counts.update(found[1])
        return rewards, dict(counts)

    return scored

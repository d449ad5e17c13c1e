"""Communication between the processes of one run.

Every process draws the same questions, samples and scores its share, and receives the rest. Then
all hold the same batch and compute the same advantages. riskpo/trainer/parallel.py handles the
model and its gradients.

State is gathered by hand: torch.distributed.checkpoint.state_dict expects an optimiser over the
model's own weights, and ours steps float32 copies.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

PATIENCE = timedelta(hours=2)  # one process may check golds, or load, while the others wait


@dataclass(frozen=True)
class Ranks:
    """This process among `size`; `local_size` of them run on this machine. Default: one process."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    owns_group: bool = False  # this object made the process group and ends it

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
        """Call `make` on the first rank; every rank gets its result, or raises its exception."""
        if self.size == 1:
            return make()
        said: list[Any] = [None, None]
        if self.is_first:
            try:
                said[0] = make()
            except Exception as error:  # without it the other ranks would wait for ever
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
        """RuntimeError if `value` (numbers, strings, tensors, nested) differs between the ranks."""
        if self.size > 1 and len(set(self.gather(digest(value)))) > 1:
            raise RuntimeError(
                f"ranks: {what} differ between the processes; expected the same on all of them. "
                "Start every process with the same command, data files and library versions."
            )


ALONE = Ranks()


def digest(value: object) -> str:
    """A hash of the exact values. The order of a dict counts."""
    text = json.dumps(value, default=lambda tensor: [str(tensor.dtype), tensor.tolist()])
    return hashlib.sha256(text.encode()).hexdigest()


def best_device() -> str:
    """ "cuda" if there is a GPU, else "cpu". CUDA_VISIBLE_DEVICES="" hides the GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, detached. A shard of FSDP2 is gathered first, so all ranks have to call."""
    detached = tensor.detach()
    return detached.full_tensor() if hasattr(detached, "full_tensor") else detached


def to_first(tree: Any, ranks: Ranks, memo: dict[int, Any] | None = None) -> Any:
    """`tree` (dicts, lists, tuples) with its sharded tensors gathered, one at a time.

    All ranks have to call. The first rank gets each whole tensor on the CPU, the others None. Other
    tensors are passed through. A tensor that occurs twice is gathered once and stays one tensor.
    """
    memo = {} if memo is None else memo
    if isinstance(tree, dict):
        return {key: to_first(value, ranks, memo) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(to_first(value, ranks, memo) for value in tree)
    if not isinstance(tree, torch.Tensor):
        return tree
    if id(tree) not in memo:
        full = whole_tensor(tree)
        sharded, mine = hasattr(tree, "full_tensor"), ranks.is_first
        memo[id(tree)] = (full.cpu() if mine else None) if sharded else full
    return memo[id(tree)]


def like_shard(tensor: Any, other: Any) -> Any:
    """A copy of the whole `tensor`, on the device of `other` and sharded like it.

    A tensor of another shape (a step counter) is only copied; None stays None.
    """
    if tensor is None or tensor.shape != other.shape:
        return tensor if tensor is None else tensor.clone()
    if not hasattr(other, "device_mesh"):
        return tensor.to(other.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)

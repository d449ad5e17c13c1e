"""The model as the update sees it: alone, replicated over the processes (DDP) or sharded (FSDP2).

Gradients are averaged over the processes; a loss that divides by a global number is multiplied by
the number of processes to make up for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from riskpo.ranks import ALONE, Ranks

T = TypeVar("T")


class _Through(torch.nn.Module):
    """Runs any function of the model inside a forward: that is where DDP and FSDP2 do their work.

    So the head's weight is whole, and a plain tensor, wherever the function looks at it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *args: Any) -> T:
        return function(self.model, *args)


@dataclass
class Trainee:
    """The model as the update sees it: alone, replicated over the ranks, or sharded."""

    model: Any
    ranks: Ranks = ALONE
    sharded: bool = False
    outer: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.ranks.size == 1:
            return
        with torch.no_grad():
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                dist.broadcast(tensor.data, src=0)
        through = _Through(self.model)
        if self.sharded:
            self.outer = _shard(through)
            # The first forward settles which module is the root, and leaves its weights gathered.
            self.outer(lambda model: None)
            self.outer.reshard()
        else:
            self.outer = torch.nn.parallel.DistributedDataParallel(through, init_sync=False)

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """function(model, *args), in the forward of what holds the model."""
        if self.outer is None:
            return function(self.model, *args)
        return self.outer(function, *args)

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch; replicas only meet at the last one's."""
        if self.outer is None or self.sharded or last:
            yield
        else:
            with self.outer.no_sync():
                yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the model is whole in every process and may be called as it is, without grad."""
        if self.outer is None or not self.sharded:
            yield
            return
        parts: list[Any] = [m for m in self.outer.modules() if isinstance(m, _fsdp_module())]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(part is not self.outer, recurse=False)

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """The whole model's weights on the first rank, None elsewhere; all ranks must call it."""
        found = {}
        for name, tensor in self.model.state_dict().items():
            full = whole_tensor(tensor)
            if self.ranks.is_first:
                found[name] = full.cpu() if self.sharded else full
        return found if self.ranks.is_first else None


def _shard(through: _Through) -> Any:
    """FSDP2: each decoder layer a unit, the rest (embedding, norm, head) with the root.

    Gradients are reduced in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    names = set(through.model._no_split_modules or ())
    for module in list(through.model.modules()):
        if type(module).__name__ in names:
            fully_shard(module, mp_policy=policy)
    return fully_shard(through, mp_policy=policy)


def _fsdp_module() -> type:
    from torch.distributed.fsdp import FSDPModule

    return FSDPModule


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, detached; gathered where FSDP2 holds a shard of it (all ranks call)."""
    detached = tensor.detach()
    return detached.full_tensor() if hasattr(detached, "full_tensor") else detached


def whole_tree(tree: Any) -> Any:
    """`tree` (dicts, lists, tuples) with every shard gathered; all ranks call."""
    if isinstance(tree, torch.Tensor):
        return whole_tensor(tree) if hasattr(tree, "full_tensor") else tree
    if isinstance(tree, dict):
        return {key: whole_tree(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(whole_tree(value) for value in tree)
    return tree


def like_shard(tensor: Any, other: Any) -> Any:
    """A whole `tensor` laid over the ranks as `other` is, where that is a shard of its shape."""
    if not hasattr(other, "device_mesh") or tensor is None or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None
    )

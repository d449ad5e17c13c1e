"""The model as the update sees it: alone, replicated over the processes (DDP) or sharded (FSDP2).

DDP and FSDP2 average gradients over the processes. A loss with a global denominator is therefore
multiplied by the number of processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from riskpo.distributed import ALONE, Ranks, best_device, to_first

T = TypeVar("T")


class _Through(torch.nn.Module):
    """Calls a function of the model inside a forward, where DDP and FSDP2 hook in.

    The function sees the head's weight whole, as a plain tensor.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., T], *args: Any) -> T:
        return function(self.model, *args)


class ParallelModel:
    """The model as the update sees it: alone, replicated over the ranks, or sharded."""

    def __init__(self, model: Any, ranks: Ranks = ALONE, sharded: bool = False) -> None:
        self.model, self.ranks = model, ranks
        self.outer: Any = None
        self.sharded = sharded and ranks.size > 1
        if ranks.size == 1:
            return
        through = _Through(model)
        if self.sharded:
            self.outer = _shard(through)
            self.look(lambda model: None)  # the first forward settles which module is the root
        else:
            _share(through)
            self.outer = torch.nn.parallel.DistributedDataParallel(through, init_sync=False)

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """function(model, *args), called inside the wrapper's forward."""
        if self.outer is None:
            return function(self.model, *args)
        return self.outer(function, *args)

    def lines(self) -> list[str]:
        """What sampling from a sharded model costs, for the log."""
        if not self.sharded:
            return []
        size = sum(p.numel() * p.element_size() for p in self.model.parameters()) / 2**30
        return [
            f"sharded over {self.ranks.size} processes: while it samples, each gathers all "
            f"{size:.1f} GiB of weights"
        ]

    @torch.no_grad()
    def look(self, function: Callable[..., T]) -> T:
        """function(model) without gradients; shards the weights again. All ranks have to call."""
        found = self(function)
        if self.sharded:
            self.outer.reshard()  # a forward leaves the root's weights gathered
        return found

    @contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Around a micro-batch's forward and backward; DDP reduces gradients only in the last."""
        if self.outer is None or self.sharded or last:
            yield
        else:
            with self.outer.no_sync():
                yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Unshard the model in every process; inside, call it directly and without gradients."""
        if not self.sharded:
            yield
            return
        from torch.distributed.fsdp import FSDPModule

        parts: list[Any] = [m for m in self.outer.modules() if isinstance(m, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(part is not self.outer, recurse=False)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole model's weights, on the first rank; all ranks have to call. See to_first."""
        return to_first(self.model.state_dict(keep_vars=True), self.ranks)


def skeleton(model: Any) -> Any:
    """A copy of `model` on the meta device: every module and setting, and no data."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, torch.nn.Parameter):
            memo[id(tensor)] = torch.nn.Parameter(memo[id(tensor)], tensor.requires_grad)
    return copy.deepcopy(model, memo)


@torch.no_grad()
def _share(module: torch.nn.Module) -> None:
    """Broadcast the first rank's tensors into `module`, on this rank's device; fills a skeleton."""
    for tensor in (*module.parameters(), *module.buffers()):
        if hasattr(tensor, "device_mesh"):
            continue  # of an inner module that is sharded already
        if tensor.is_meta:
            filled = torch.empty_like(tensor, device=best_device())
            if isinstance(tensor, torch.nn.Parameter):
                filled = torch.nn.Parameter(filled, tensor.requires_grad)
            torch.utils.swap_tensors(tensor, filled)  # in place: tied weights stay tied
        elif tensor.device.type != best_device():
            tensor.data = tensor.data.to(best_device())
        dist.broadcast(tensor.data, src=0)


def _shard(through: _Through) -> Any:
    """FSDP2: each decoder layer is a unit; embedding, norm and head belong to the root.

    A rank's device holds one whole layer at a time. Gradients are reduced in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    names = set(through.model._no_split_modules or ())
    for module in list(through.model.modules()):
        if type(module).__name__ in names:
            _share(module)
            fully_shard(module, mp_policy=policy)
    _share(through)
    return fully_shard(through, mp_policy=policy)

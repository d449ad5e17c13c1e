"""What crosses between ranks: a head whole again from its columns, and sums over all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def whole(part: torch.Tensor, group: Any) -> torch.Tensor:
    """[V_r, ...] of every rank, in rank order, as [V, ...]. This rank's part keeps its gradient:
    all ranks compute the same loss, so the part's share of the whole gradient is its own."""
    mine = part.detach().contiguous()
    sizes = [torch.empty(1, dtype=torch.int64, device=mine.device) for _ in range(group.size())]
    dist.all_gather(sizes, torch.full_like(sizes[0], len(mine)), group=group)
    parts = [mine.new_empty(int(size), *mine.shape[1:]) for size in sizes]
    for rank, other in enumerate(parts):
        if rank == group.rank():
            other.copy_(mine)
        dist.broadcast(other, group=group, group_src=rank)
    parts[group.rank()] = part
    return torch.cat(parts)


def summed(x: torch.Tensor, group: Any) -> torch.Tensor:
    """x summed over the ranks; the loss is the sum of the ranks' losses, so gradients are too."""
    return x if group is None else _Summed.apply(x, group)


def largest(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The largest x of all ranks."""
    if group is None:
        return x
    x = x.detach().clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None

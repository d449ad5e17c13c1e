"""A head whose rows are spread over data-parallel ranks (FSDP2, ZeRO-3), whole for the ops.

The ops multiply with many tiles of the head in both passes, so the head is gathered once, before
the call. docs/sharding.md says which of the two functions a loop needs.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import torch

from riskpo_kernels.core.checks import check_choice, reject

REDUCE = ("mean", "sum")


def full_weight(weight: torch.Tensor, *, reduce: str = "mean") -> torch.Tensor:
    """The whole head [V, D] of a sharded parameter; one all_gather now, one reduce_scatter in the
    backward, however many ops use the result in between.

    weight   DTensor (FSDP2 outside its module's forward), whose .grad becomes a DTensor of the same
             placement; a plain tensor is whole and comes back as it is, its gradient untouched
    reduce   what the ranks' gradients of a DTensor become: "mean", as FSDP takes it, or "sum"

    Raises ValueError for a ZeRO-3 placeholder, which only `gathered_weight` can fill.
    """
    op = "full_weight"
    check_choice(op, "reduce", reduce, REDUCE)
    if hasattr(weight, "ds_tensor") and weight.numel() == 0:
        todo = "Use `with gathered_weight(weight)` around forward and backward."
        reject(op, "a ZeRO-3 parameter outside its gather", "a DTensor or a whole tensor", todo)
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial

    ranks, axes = weight.device_mesh.size(), weight.device_mesh.ndim  # type: ignore[attr-defined]
    whole = weight.full_tensor(grad_placements=[Partial()] * axes)
    if whole.requires_grad and reduce == "mean":
        whole.register_hook(lambda gradient: gradient / ranks)
    return whole


@contextlib.contextmanager
def gathered_weight(weight: torch.Tensor, *, reduce: str = "mean") -> Iterator[torch.Tensor]:
    """The whole head [V, D] for a block that holds forwards and backwards of several micro-batches:
    one all_gather on entry, one reduce_scatter on exit.

    weight   DTensor: the block gets a leaf, whose gradient is added to weight.grad on exit; every
             rank leaves the block, and has called backward in it or none has. ZeRO-3 parameter:
             gathered by deepspeed, whose hooks reduce the gradient. A plain tensor: itself.
    reduce   as in full_weight; DeepSpeed takes the mean

    Raises ValueError where a ZeRO-3 parameter comes without deepspeed installed.
    """
    op = "gathered_weight"
    check_choice(op, "reduce", reduce, REDUCE)
    if hasattr(weight, "ds_tensor"):
        if importlib.util.find_spec("deepspeed") is None:
            todo = "Install deepspeed, which made this parameter."
            reject(op, "a ZeRO-3 parameter", "deepspeed to gather it", todo)
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            yield weight
    elif hasattr(weight, "full_tensor"):
        whole = full_weight(weight, reduce=reduce)
        leaf = whole.detach().requires_grad_(whole.requires_grad)
        yield leaf
        if leaf.grad is not None:
            whole.backward(leaf.grad)
    else:
        yield weight

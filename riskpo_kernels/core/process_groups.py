"""What the ops need of process groups: to find one by name, and to see that its ranks agree.

An operator's argument cannot be a group, so groups travel by name. A rank that calls with other
sizes than its peers would leave them waiting in a collective; `agree` turns that into an error.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from riskpo_kernels.core.checks import describe, reject

NO_GROUP = ""


def name_of(op: str, argument: str, group: Any) -> str:
    """The name by which `group_called` finds a process group; NO_GROUP for None."""
    if group is None:
        return NO_GROUP
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        came = f"{argument} = {describe(group)}"
        todo = "Pass what torch.distributed.new_group or DeviceMesh.get_group returns."
        reject(op, came, "a torch.distributed.ProcessGroup of this rank", todo)
    return group.group_name


def group_called(name: str) -> Any:
    """The process group of that name, None for NO_GROUP."""
    if name == NO_GROUP:
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]


def agree(
    op: str,
    group: Any,
    device: torch.device,
    *,
    same: dict[str, int | torch.Tensor],
    own: int = 0,
) -> list[int]:
    """Every rank's `own` number, in rank order. One all_gather and one host synchronisation.

    same: integers by name that must be equal on all ranks; ValueError, on every rank, if not.
    """
    numbers = [torch.as_tensor(x, dtype=torch.int64, device=device) for x in (own, *same.values())]
    mine = torch.stack(numbers)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    rows = torch.stack(everyone).tolist()
    for name, values in zip(same, list(zip(*rows, strict=True))[1:], strict=True):
        if len(set(values)) > 1:
            todo = "Call the op with the same rows and options on every rank of the group."
            reject(op, f"{name} = {list(values)} by rank", "one number on all ranks", todo)
    return [row[0] for row in rows]


def sum_over(group: Any, x: torch.Tensor) -> torch.Tensor:
    """x summed over the ranks, in place."""
    dist.all_reduce(x, op=dist.ReduceOp.SUM, group=group)
    return x


def max_over(group: Any, x: torch.Tensor) -> torch.Tensor:
    """The largest x of all ranks, in place."""
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x

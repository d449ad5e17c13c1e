"""The backward of linear_logprob over rows [N]: what the forward kept becomes rows to visit and the
numbers of their gradients. lm_head/backward.py visits them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from riskpo_kernels.core.column_order import ColumnOrder
from riskpo_kernels.core.gradient import RowGradient
from riskpo_kernels.core.low_rank import LowRank
from riskpo_kernels.core.matmul import Head, Options
from riskpo_kernels.core.process_groups import group_called, sum_over
from riskpo_kernels.core.softmax import ActiveBlocks, RowStats
from riskpo_kernels.lm_head.backward import arranged, backward_rows
from riskpo_kernels.lm_head.ways import Ways


def backward_sums(
    needs: list[bool],
    upstream: tuple[torch.Tensor | None, ...],
    tensors: tuple[Any, ...],
    found: tuple[torch.Tensor, ...],
    o: Options,
    *,
    wide: bool = False,
    low_rank: LowRank | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """dH, dW, dbias; wide: as their float32 sums, dH of this rank's columns alone. upstream: the
    gradients of logprob, entropy and lse; tensors, found: as lm_head/operator.py's forward has
    them, lse left out."""
    hidden, weight, bias, target, row_temperature = tensors
    logprob, entropy, peak, log_sum, bits, dense, pairs, columns, kept = found
    o, dtype = o.resolved(hidden, weight), logprob.dtype
    c, g, e = (None if x is None else x.to(dtype) for x in upstream)
    g = g if o.return_entropy else None  # a compiled graph sends zeros instead of nothing
    bias = None if bias is None else bias.contiguous()
    map, local = o.map(row_temperature, dtype), target.long()
    local = local - columns if o.group else local
    order = None
    if not o.group and columns.numel() and columns[0] >= 0:
        order = ColumnOrder(columns)
        local = order.places(local)
    head = Head(hidden, weight, bias, None, local, map, kept, low_rank, order)
    stats = RowStats(logprob, entropy if o.return_entropy else None, peak, log_sum)
    up = RowGradient.new(stats, c, g, e, map)
    active = ActiveBlocks(bits, dense, pairs) if dense.numel() else None
    sent = up.live()  # the other rows enter no product
    if o.ignore_index is not None:
        sent &= target != o.ignore_index
    head, up, active, ways = arranged(head, up, active, sent, o)
    if o.group and not wide:
        return _shard_backward(head, up, active, ways, needs, o)
    return backward_rows(head, up, active, ways, needs, o, wide_dh=wide, wide_dw=wide)


def _shard_backward(
    head: Head,
    up: RowGradient,
    active: ActiveBlocks | None,
    ways: Ways,
    needs: list[bool],
    o: Options,
) -> tuple[torch.Tensor | None, ...]:
    """backward_rows on one shard of the vocabulary; dH is summed over the ranks before it is
    rounded, in one float32 buffer of the rows with a coefficient."""
    hidden, rows = head.hidden, head.rows
    head = replace(head, hidden=head.take(slice(None), hidden.dtype), rows=None)
    dh, dw, db = backward_rows(head, up, active, ways, needs, o, wide_dh=True)
    if dh is not None:
        dh = sum_over(group_called(o.group), dh).to(hidden.dtype)
        dh = dh if rows is None else torch.zeros_like(hidden).index_copy(0, rows, dh)
    return dh, dw, db

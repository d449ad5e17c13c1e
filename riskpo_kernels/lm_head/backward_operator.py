"""The operator behind the backward of linear_logprob, over rows [N]: what the forward kept becomes
the rows to visit and their gradients, lm_head/backward.py visits them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from riskpo_kernels.core.gradient import RowGradient
from riskpo_kernels.core.low_rank import LowRank
from riskpo_kernels.core.matmul import Head, Options
from riskpo_kernels.core.operators import gradients_fake, register, schema_of
from riskpo_kernels.core.process_groups import group_called, sum_over
from riskpo_kernels.core.softmax import ActiveBlocks, RowStats
from riskpo_kernels.lm_head.backward import arranged, backward_rows
from riskpo_kernels.lm_head.ways import Ways


def backward_sums(
    needs: list[bool],
    c: torch.Tensor | None,
    g: torch.Tensor | None,
    e: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_temperature: torch.Tensor | None,
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    peak: torch.Tensor,
    log_sum: torch.Tensor,
    bits: torch.Tensor,
    dense: torch.Tensor,
    pairs: torch.Tensor,
    offset: torch.Tensor,
    kept: torch.Tensor,
    ignore_index: int | None,
    group: str,
    *numbers: Any,
    wide: bool = False,
    low_rank: LowRank | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """dH, dW, dbias; wide: as their float32 sums, dH of this rank's columns alone."""
    o, dtype = Options.of(hidden, weight, numbers), logprob.dtype
    g = g if o.return_entropy else None  # a compiled graph sends zeros instead of nothing
    c, g, e = (None if x is None else x.to(dtype) for x in (c, g, e))
    bias = None if bias is None else bias.contiguous()
    map, local = o.map(row_temperature, dtype), target.long()
    local = local - offset if group else local
    head = Head(hidden, weight, bias, None, local, map, kept, low_rank)
    stats = RowStats(logprob, entropy if o.return_entropy else None, peak, log_sum)
    up = RowGradient.new(stats, c, g, e, map)
    active = ActiveBlocks(bits, dense, pairs) if dense.numel() else None
    sent = up.live()  # the other rows enter no product
    if ignore_index is not None:
        sent &= target != ignore_index
    head, up, active, ways = arranged(head, up, active, sent, o)
    if group and not wide:
        return _shard_backward(head, up, active, ways, needs, o, group)
    return backward_rows(head, up, active, ways, needs, o, wide_dh=wide, wide_dw=wide)


def _shard_backward(
    head: Head,
    up: RowGradient,
    active: ActiveBlocks | None,
    ways: Ways,
    needs: list[bool],
    o: Options,
    group: str,
) -> tuple[torch.Tensor | None, ...]:
    """backward_rows on one shard of the vocabulary; dH is summed over the ranks before it is
    rounded, in one float32 buffer of the rows with a coefficient."""
    hidden, rows = head.hidden, head.rows
    head = replace(head, hidden=head.take(slice(None), hidden.dtype), rows=None)
    dh, dw, db = backward_rows(head, up, active, ways, needs, o, wide_dh=True)
    if dh is not None:
        dh = sum_over(group_called(group), dh).to(hidden.dtype)
        dh = dh if rows is None else torch.zeros_like(hidden).index_copy(0, rows, dh)
    return dh, dw, db


def _backward(needs: list[bool], *args: Any) -> tuple[torch.Tensor, ...]:
    gradients = backward_sums(needs, *args)
    return tuple(args[3].new_empty(0) if x is None else x for x in gradients)


backward_operator = register(
    "linear_logprob_backward",
    schema_of(backward_sums, Options, 3),
    _backward,
    fake=gradients_fake,
)

"""The operators behind linear_logprob: forward and backward over rows [N], one opaque node each.

Their results have the caller's number of rows, whatever is ignored, so that their sizes are known
without looking at a value (torch.compile); inside, ignored rows enter no product. What the
backward needs of the forward is among the results: 16 to 20 bytes and V / 1024 bytes a row, and on
a CPU the logits that were kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from riskpo_kernels.core.backends import choose
from riskpo_kernels.core.checks import live_rows
from riskpo_kernels.core.matmul import Products, exact_products
from riskpo_kernels.core.operators import (
    gradients_fake,
    gradients_through,
    register,
    schema_of,
)
from riskpo_kernels.core.process_groups import group_called, sum_over
from riskpo_kernels.core.softmax import (
    KeptLogits,
    LogitMap,
    RowGradient,
    RowStats,
    finish,
    kept_columns,
)
from riskpo_kernels.lm_head.backward import arranged, backward_rows
from riskpo_kernels.lm_head.block_filter import ActiveBlocks, Ways
from riskpo_kernels.lm_head.low_rank import LowRank
from riskpo_kernels.lm_head.tiles import Head, Options, forward_rows
from riskpo_kernels.lm_head.vocab_parallel import VocabShard

OP = "linear_logprob"
# forward's: logprob, entropy, lse | peak, log_sum | bits, dense, pairs | offset | kept logits
RESULTS = 10


def saving(tensors: int, differentiable: int, skip: int | None = None) -> Callable[..., None]:
    """The `setup_context` of gradients_through: keeps the first `tensors` inputs and all outputs
    but the one at `skip`; the first `differentiable` outputs have gradients."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        kept = (x for i, x in enumerate(output) if i != skip)
        ctx.save_for_backward(*inputs[:tensors], *kept)
        ctx.options = inputs[tensors:]
        ctx.set_materialize_grads(False)  # a gradient nobody sent costs nothing
        ctx.mark_non_differentiable(*output[differentiable:])

    return setup_context


def wide_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def resolve(hidden: torch.Tensor, weight: torch.Tensor, numbers: tuple[Any, ...]) -> Options:
    o = Options(*numbers)
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    backend = choose(OP, o.backend, hidden.device, dtype)
    if hidden.device.type == "cuda" and dtype == torch.float32:
        backend = "torch"  # the kernels' tiles would spill in float32; cuBLAS's do not
    return replace(o, backend=backend)


def map_of(o: Options, row_temperature: torch.Tensor | None, wide: torch.dtype) -> LogitMap:
    if row_temperature is None:
        return LogitMap(o.scale, o.softcap, o.temperature)
    return LogitMap(o.scale, o.softcap, row_temperature.to(wide).contiguous())


def find_shard(
    group: str, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, o: Options
) -> VocabShard | None:
    if not group:
        return None
    same: dict[str, int | torch.Tensor] = {  # what the number of collectives hangs on, and more
        "rows": target.shape[0],
        "hidden width": hidden.shape[1],
        "bytes of a sum": wide_of(hidden, weight).itemsize,
        "sum of the targets": target.sum(),
        "return_entropy": o.return_entropy,
        "triton": o.backend == "triton",
        "memory_mib * 1024": int(o.memory_mib * 1024),
    }
    return VocabShard.find(OP, group_called(group), weight, same)


def put_among(keep: torch.Tensor | None, n: int, x: torch.Tensor) -> torch.Tensor:
    """Live rows' numbers (along the last dimension) among all n rows; zero elsewhere."""
    return x if keep is None else x.new_zeros(*x.shape[:-1], n).index_copy(-1, keep, x)


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_temperature: torch.Tensor | None,
    ignore_index: int | None,
    group: str,
    *numbers: Any,
    low_rank: LowRank | None = None,
) -> tuple[torch.Tensor, ...]:
    o = resolve(hidden, weight, numbers)
    shard = find_shard(group, hidden, weight, target, o)
    offset, vocab = (shard.offset, shard.total) if shard else (0, weight.shape[0])
    bias = None if bias is None else bias.contiguous()
    map = map_of(o, row_temperature, wide_of(hidden, weight))
    kept = _kept(hidden, weight, group, o)
    given = (hidden, weight, bias, target, map, ignore_index)
    with exact_products(hidden.device):
        if o.backend == "triton":
            from riskpo_kernels.lm_head.triton_forward import triton_forward  # needs Triton

            dtype = Products(hidden.device, hidden.dtype, weight.dtype).dtype
            found: tuple[Any, ...] = triton_forward(*given, shard, o, dtype, low_rank)
        else:
            found = _torch_forward(*given, vocab, shard, o, kept, low_rank)
    *rows, active = found
    rows = [hidden.new_empty(0, dtype=kept.dtype) if x is None else x for x in rows]
    first = torch.full((1 if group else 0,), offset, dtype=torch.int64, device=hidden.device)
    active = _no_blocks(hidden) if active is None else active
    return *rows, *active, first, kept


def _torch_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    map: LogitMap,
    ignore_index: int | None,
    vocab: int,
    shard: VocabShard | None,
    o: Options,
    kept: torch.Tensor,
    low_rank: LowRank | None,
) -> tuple[Any, ...]:
    """logprob, entropy, lse, peak, log_sum [N], and the active blocks (None: nothing is dropped)"""
    n, offset = target.shape[0], shard.offset if shard else 0
    keep, ids = live_rows(OP, target, vocab, ignore_index, map.temperature)
    map = map if keep is None else map.of(keep)
    kept = kept if keep is None else kept.zero_()  # an operator's results are never undefined
    head = Head(hidden, weight, bias, keep, ids - offset, map, KeptLogits(kept), low_rank)
    state, active = forward_rows(head, o, shard)
    logprob, entropy, peak, log_sum = finish(state)
    rows = (logprob, entropy, peak + log_sum, peak, log_sum)
    if active is not None:
        active = ActiveBlocks(*(put_among(keep, n, x) for x in active))
    return *(None if x is None else put_among(keep, n, x) for x in rows), active


def _kept(hidden: torch.Tensor, weight: torch.Tensor, group: str, o: Options) -> torch.Tensor:
    """Room [N, K] for logits that the backward need not recompute; rows of a group move."""
    wide = wide_of(hidden, weight)
    columns = 0
    # With deterministic=True a row's products may not depend on how many rows there are.
    keeps = o.keep and not (o.deterministic or group)
    if keeps and o.backend == "torch" and hidden.device.type == "cpu":
        columns = kept_columns(hidden.shape[0], weight.shape[0], wide.itemsize, o.memory_mib)
    return hidden.new_empty(hidden.shape[0], columns, dtype=wide)


def _no_blocks(like: torch.Tensor) -> ActiveBlocks:
    return ActiveBlocks(
        *(like.new_empty(0, dtype=d) for d in (torch.uint8, torch.bool, torch.int32))
    )


def forward_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_temperature: torch.Tensor | None,
    ignore_index: int | None,
    group: str,
    *numbers: Any,
) -> tuple[torch.Tensor, ...]:
    o, n = Options(*numbers), target.shape[0]
    sizes = (n, n if o.return_entropy else 0, n, n, n)
    rows = (hidden.new_empty(size, dtype=wide_of(hidden, weight)) for size in sizes)
    selects = o.tail_eps != 0 and weight.shape[0] != 0
    blocks = ActiveBlocks.new(weight.shape[0], n, hidden.device) if selects else _no_blocks(hidden)
    first = hidden.new_empty(1 if group else 0, dtype=torch.int64)
    return *rows, *blocks, first, _kept(hidden, weight, group, resolve(hidden, weight, numbers))


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
    o, dtype = resolve(hidden, weight, numbers), logprob.dtype
    g = g if o.return_entropy else None  # a compiled graph sends zeros instead of nothing
    c, g, e = (None if x is None else x.to(dtype) for x in (c, g, e))
    bias = None if bias is None else bias.contiguous()
    map, local = map_of(o, row_temperature, dtype), target.long()
    local = local - offset if group else local
    head = Head(hidden, weight, bias, None, local, map, KeptLogits(kept), low_rank)
    stats = RowStats(logprob, entropy if o.return_entropy else None, peak, log_sum)
    up = RowGradient.new(stats, c, g, e, map)
    active = ActiveBlocks(bits, dense, pairs) if dense.numel() else None
    sent = up.live()  # the other rows enter no product
    if ignore_index is not None:
        sent &= target != ignore_index
    head, up, active, ways = arranged(head, up, active, sent, o)
    with exact_products(hidden.device):
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


_backward_operator = register(
    "linear_logprob_backward",
    schema_of(backward_sums, Options, 3),
    _backward,
    fake=gradients_fake,
)


head_operator = register(
    OP,
    schema_of(forward, Options, RESULTS),
    forward,
    fake=forward_fake,
    setup_context=saving(5, 3, skip=2),
    backward=gradients_through(_backward_operator, 3),
)

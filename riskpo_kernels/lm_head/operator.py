"""The forward of linear_logprob over rows [N], as an operator that PyTorch sees as one opaque node.

Its tiles of [rows, cols] logits fit in memory_mib; each is folded into a few numbers a row
(core/softmax.py). Its results have the caller's number of rows, whatever is ignored, so that their
sizes are known without looking at a value (torch.compile); inside, ignored rows enter no product.
What the backward needs of the forward is among the results: 16 to 20 bytes and V / 1024 bytes a
row, and on a CPU the logits that were kept. lm_head/backward_operator.py goes on with them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from riskpo_kernels.core import softmax
from riskpo_kernels.core.checks import live_rows
from riskpo_kernels.core.column_order import PROBES, ColumnOrder, find_order
from riskpo_kernels.core.low_rank import LowRank
from riskpo_kernels.core.matmul import (
    FORWARD_TILE,
    Head,
    Options,
    Products,
    padded,
    plan_for,
    products_of,
    put_among,
    spans,
    wide_of,
)
from riskpo_kernels.core.operators import differentiable
from riskpo_kernels.core.softmax import (
    BLOCK,
    CAP,
    ActiveBlocks,
    LogitMap,
    RowState,
    finish,
    kept_columns,
    n_blocks,
    row_eps,
    select,
)
from riskpo_kernels.lm_head.backward_operator import backward_sums
from riskpo_kernels.lm_head.vocab_parallel import VocabShard, find_shard

OP = "linear_logprob"
ORDERED = 8192  # the smallest vocabulary whose columns may be put in another order
# logprob, entropy, lse, which are sent gradients | peak, log_sum | active blocks | columns | kept.
# columns: where a shard's begin [1], or which id each is [V] (-1: its own place), or nothing [0]
RESULTS, SENT, LSE = 10, 3, 2


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_temperature: torch.Tensor | None,
    o: Options,
    *,
    low_rank: LowRank | None = None,
) -> tuple[torch.Tensor, ...]:
    o = o.resolved(hidden, weight)
    shard = find_shard(hidden, weight, target, o) if o.group else None
    columns = _columns(hidden, weight, o)
    bias = None if bias is None else bias.contiguous()
    map = o.map(row_temperature, wide_of(hidden, weight))
    kept = _kept(hidden, weight, o)
    given = (hidden, weight, bias, target, map, o.ignore_index, shard, o, low_rank)
    if o.backend == "triton":
        from riskpo_kernels.lm_head.triton_forward import triton_forward  # needs Triton

        found: tuple[Any, ...] = triton_forward(*given)
    else:
        found = _torch_forward(*given, kept, columns)
    *rows, active = found
    rows = [hidden.new_empty(0, dtype=kept.dtype) if x is None else x for x in rows]
    if shard is not None:
        columns.fill_(shard.offset)
    active = _no_blocks(hidden) if active is None else active
    return *rows, *active, columns, kept


def _torch_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    map: LogitMap,
    ignore_index: int | None,
    shard: VocabShard | None,
    o: Options,
    low_rank: LowRank | None,
    kept: torch.Tensor,
    columns: torch.Tensor,
) -> tuple[Any, ...]:
    """logprob, entropy, lse, peak, log_sum [N], and the active blocks (None: nothing is dropped)"""
    n = target.shape[0]
    offset, vocab = (shard.offset, shard.total) if shard else (0, weight.shape[0])
    keep, ids = live_rows(OP, target, vocab, ignore_index, map.temperature)
    map = map if keep is None else map.of(keep)
    kept = kept if keep is None else kept.zero_()  # an operator's results are never undefined
    head = Head(hidden, weight, bias, keep, ids - offset, map, kept, low_rank)
    if shard is None and columns.numel():
        found = find_order(partial(_probabilities, head), head.n, o.tail_eps)
        columns.copy_(found) if found is not None else columns.fill_(-1)
        if found is not None:
            order = ColumnOrder(columns)
            head = replace(head, target=order.places(head.target), order=order)
    state, active = forward_rows(head, o, shard)
    logprob, entropy, peak, log_sum = finish(state)
    rows = (logprob, entropy, peak + log_sum, peak, log_sum)
    if active is not None:
        active = ActiveBlocks(*(put_among(keep, n, x) for x in active))
    return *(None if x is None else put_among(keep, n, x) for x in rows), active


def forward_rows(
    head: Head, o: Options, shard: VocabShard | None = None
) -> tuple[RowState, ActiveBlocks | None]:
    """The softmax state of the rows and, unless tail_eps is 0, which blocks are active. The columns
    may be one shard of the vocabulary; the state is always that of all of it."""
    products = products_of(head)
    plan = plan_for(head, o, products, shard.widest if shard else head.vocab)
    tile = torch.empty(plan.rows * plan.cols, dtype=products.wide, device=head.hidden.device)
    state = RowState.new(head.n, o.return_entropy, head.hidden, products.wide)
    active = None
    if o.tail_eps and head.vocab:
        active = ActiveBlocks.new(head.vocab, head.n, head.hidden.device)
    for r in spans(head.n, plan.rows):
        h, part = head.take(r, products.dtype, plan.rows if o.deterministic else 0), state.of(r)
        if h.shape[0] > part.m.numel():
            part = RowState.new(h.shape[0], o.return_entropy, head.hidden, products.wide)
        blocks = None
        if active is not None:
            blocks = h.new_empty(h.shape[0], n_blocks(head.vocab), dtype=products.wide)
        for v in spans(head.vocab, plan.cols):
            raw = tile[: h.shape[0] * (v.stop - v.start)].view(h.shape[0], -1)
            _fold(head, products, r, v, h, raw, part, blocks)
        if shard is not None:
            shard.merge(part)
        if active is not None and blocks is not None:
            stats, target = finish(part), padded(head.target[r], h.shape[0])
            eps = row_eps(o.tail_eps, stats, head.map_of(r, h.shape[0]))
            cap = CAP / shard.ranks if shard else CAP
            if head.order is not None and head.hidden.dtype.itemsize == 2:
                cap /= 2  # with an order flat rows lose all of it, beside rounding
            keep = select(blocks, target, stats, eps, o.return_entropy, cap)
            active.record(r, keep[: r.stop - r.start], by_row=o.deterministic)
        state.put(r, part)
    return state, active


def _fold(
    head: Head,
    products: Products,
    r: slice,
    v: slice,
    h: torch.Tensor,
    raw: torch.Tensor,
    state: RowState,
    blocks: torch.Tensor | None,
) -> None:
    """Columns v of rows r, whose hidden states are h, into the rows' state, by way of `raw`."""
    products.into(raw, h, head.columns(v, products.dtype).T)
    head.keep(r, v, raw)
    here = None if blocks is None else blocks[:, v.start // BLOCK : n_blocks(v.stop)]
    target, bias = head.targets(r, v, len(h)), head.bias_of(v, products.wide)
    softmax.fold(raw, target, bias, state, head.map_of(r, len(h)), here)


def _probabilities(head: Head, rows: torch.Tensor) -> torch.Tensor:
    """Of the columns for a few rows, [V, R]."""
    products = products_of(head)
    h, map = head.take(rows, products.dtype).T, head.map_of(rows)
    p = torch.empty(head.vocab, len(rows), dtype=products.wide, device=head.hidden.device)
    for v in spans(head.vocab, FORWARD_TILE["cpu"][1]):
        products.into(p[v], head.columns(v, products.dtype), h)
    softmax.mapped(p.T, head.bias_of(slice(None), products.wide), map, slope=False)
    p.sub_(p.amax(0)).exp_()
    return p.div_(p.sum(0))


def _columns(hidden: torch.Tensor, weight: torch.Tensor, o: Options) -> torch.Tensor:
    """Room for where the columns lie. With deterministic=True rows may not feel their company; in a
    small head there is little to save."""
    vocab, size = weight.shape[0], 1 if o.group else 0
    on_cpu = o.backend == "torch" and hidden.device.type == "cpu"
    fits = 8 * PROBES * vocab < o.memory_mib * 2**20
    if on_cpu and o.keep and o.tail_eps and fits and not (o.group or o.deterministic):
        size = vocab if vocab >= ORDERED else 0
    return hidden.new_empty(size, dtype=torch.int64)


def _kept(hidden: torch.Tensor, weight: torch.Tensor, o: Options) -> torch.Tensor:
    """Room [N, K] for logits that the backward need not recompute; rows of a group move. A GPU
    recomputes this little in microseconds."""
    wide = wide_of(hidden, weight)
    columns = 0
    # With deterministic=True a row's products may not depend on how many rows there are.
    keeps = o.keep and not (o.deterministic or o.group)
    if keeps and o.backend == "torch" and hidden.device.type == "cpu":
        columns = kept_columns(hidden.shape[0], weight.shape[0], wide.itemsize, o.memory_mib)
    return hidden.new_empty(hidden.shape[0], columns, dtype=wide)


def _no_blocks(like: torch.Tensor) -> ActiveBlocks:
    return ActiveBlocks(
        *(like.new_empty(0, dtype=d) for d in (torch.uint8, torch.bool, torch.int32))
    )


def forward_fake(
    hidden: torch.Tensor, weight: torch.Tensor, _: Any, target: torch.Tensor, __: Any, o: Options
) -> tuple[torch.Tensor, ...]:
    o, n = o.resolved(hidden, weight), target.shape[0]
    sizes = (n, n if o.return_entropy else 0, n, n, n)
    rows = (hidden.new_empty(size, dtype=wide_of(hidden, weight)) for size in sizes)
    selects = o.tail_eps != 0 and weight.shape[0] != 0
    blocks = ActiveBlocks.new(weight.shape[0], n, hidden.device) if selects else _no_blocks(hidden)
    return *rows, *blocks, _columns(hidden, weight, o), _kept(hidden, weight, o)


head_operator = differentiable(
    OP, forward, backward_sums, Options, fake=forward_fake, results=RESULTS, sent=SENT, unsaved=LSE
)

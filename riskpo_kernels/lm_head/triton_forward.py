"""The forward of a head by the Triton kernels, for rows [N]: four launches whatever N, D and V.

    live_kernel          checks the targets and puts the rows that are not ignored first
    (hidden[order])      copies their hidden states, where some are ignored
    statistics_kernel    the product, and statistics of each row's blocks of 128 columns
    finish_kernel        results of the rows and their active blocks

The statistics take 8 bytes per row and block, 12 with an entropy. Rows whose statistics do not fit
in memory_mib together go in chunks, two or three launches each: at 300 MiB and V = 151,936 that is
beyond 33,000 rows, or 22,000 with an entropy. A shard of the vocabulary runs finish_kernel twice,
before and after the ranks' statistics are merged. Beside an adapter (core/low_rank.py) the
head's columns are copied, as many at a time as fit too, and each piece has a launch of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from riskpo_kernels.core import softmax
from riskpo_kernels.core.low_rank import LowRank
from riskpo_kernels.core.matmul import Head, Options, Plan, Products, plan_tiles, spans
from riskpo_kernels.core.softmax import ActiveBlocks, LogitMap, RowState, n_blocks
from riskpo_kernels.kernels import readable
from riskpo_kernels.kernels.finish_rows import FROM_STATE, TO_STATE, WHOLE, finish
from riskpo_kernels.kernels.head_forward import BlockStatistics, statistics
from riskpo_kernels.kernels.live_rows import live_first
from riskpo_kernels.lm_head.vocab_parallel import VocabShard

OP = "linear_logprob"


class Rows(NamedTuple):
    """Results [N] of the forward; zeros where a row is ignored."""

    logprob: torch.Tensor
    entropy: torch.Tensor | None
    lse: torch.Tensor
    peak: torch.Tensor
    log_sum: torch.Tensor
    active: ActiveBlocks | None


def triton_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    map: LogitMap,
    ignore_index: int | None,
    shard: VocabShard | None,
    o: Options,
    low_rank: LowRank | None = None,
) -> Rows:
    """hidden [N, D], weight [V, D], target [N], temperatures of `map` [N]."""
    n, vocab, device = target.shape[0], weight.shape[0], hidden.device
    dtype = Products(device, hidden.dtype, weight.dtype).dtype
    offset, total, widest = (0, vocab, vocab)
    if shard is not None:
        offset, total, widest = shard.offset, shard.total, shard.widest
    logprob, lse, peak, log_sum = (
        torch.empty(n, dtype=torch.float32, device=device) for _ in range(4)
    )
    entropy = torch.empty_like(logprob) if o.return_entropy else None
    active = _room(n, vocab, device) if o.tail_eps and vocab else None
    rows = Rows(logprob, entropy, lse, peak, log_sum, active)
    if n == 0:
        return rows
    target = target.contiguous()
    weight = readable(weight, dtype) if low_rank is None else weight
    head = Head(hidden, weight, bias, None, target, map, low_rank=low_rank)
    per_row = map.temperature if isinstance(map.temperature, torch.Tensor) else None
    with torch.cuda.device_of(hidden):
        order, live = live_first(OP, target, total, ignore_index, per_row)
        plan = _chunk(head, live, widest, order is not None, dtype, o)
        out = BlockStatistics.new(min(plan.rows, live), n_blocks(vocab), o.return_entropy, device)
        for r in list(spans(live, plan.rows)) or [slice(0, 0)]:
            part = out.of(r.stop - r.start)
            if vocab and r.stop > r.start:
                h = readable(head.take(r if order is None else order[r], dtype), dtype)
                for v in spans(vocab, plan.cols):
                    w, bias_v = head.columns(v, dtype), None if bias is None else bias[v]
                    given, place = (bias_v, target, order, map, part.columns(v)), offset + v.start
                    statistics(h, w, *given, first=r.start, offset=place)
                    del w  # it may be a copy: two do not fit
            _finish(part, rows, target, order, map, r, live, offset, vocab, shard, o)
    return rows


def _finish(
    part: BlockStatistics,
    rows: Rows,
    target: torch.Tensor,
    order: torch.Tensor | None,
    map: LogitMap,
    r: slice,
    live: int,
    offset: int,
    vocab: int,
    shard: VocabShard | None,
    o: Options,
) -> None:
    """Results of live rows r, and behind the last of them of the ignored ones."""
    here, active = r.stop - r.start, rows.active
    bits, dense, pairs = (None,) * 3 if active is None else active
    results = dict(zip(("logprob", "entropy", "total", "peak", "log_sum"), rows[:5], strict=True))
    results |= {"bits": bits, "pairs": pairs}
    results["dense"] = None if dense is None else dense.view(torch.uint8)
    ranks = 1 if shard is None else shard.ranks
    share = softmax.DENSE_SHARE["cuda" if target.is_cuda else "cpu"]

    def launch(stage: int, state: torch.Tensor | None) -> None:
        finish(
            part,
            target,
            order,
            map,
            results,
            rows=here,
            ignored=target.shape[0] - live if r.stop == live else 0,
            first=r.start,
            offset=offset,
            vocab=vocab,
            eps=o.tail_eps,
            cap=softmax.CAP / ranks,
            halvings=softmax.HALVINGS,
            dense_share=share,
            state=state,
            stage=stage,
        )

    if shard is None or not here:
        launch(WHOLE, None)
        return
    state = torch.empty(4, here, dtype=torch.float32, device=target.device)
    launch(TO_STATE, state)
    m, s, z_t, u = state.unbind()
    shard.merge(RowState(m, s, u if o.return_entropy else None, z_t))
    launch(FROM_STATE, state)


def _room(n: int, vocab: int, device: torch.device) -> ActiveBlocks:
    def room(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    bits = room(-(-n_blocks(vocab) // 8), n, dtype=torch.uint8)
    return ActiveBlocks(bits, room(n, dtype=torch.bool), room(n, dtype=torch.int32))


def _chunk(head: Head, live: int, vocab: int, copied: bool, dtype: torch.dtype, o: Options) -> Plan:
    """Rows whose statistics, and copies of whose hidden states, fit in memory_mib; columns of which
    a copy does where the head has more beside it, else all."""
    low, size = head.low_rank is not None, dtype.itemsize
    plan = plan_tiles(
        OP,
        live,
        vocab if low else 1,
        head.width,
        memory_mib=o.memory_mib,
        most_rows=max(live, 1),
        most_cols=vocab if low else 1,
        tile_bytes=0,
        edge_bytes=(size if copied or low else 0, size if low else 0),
        row_bytes=BlockStatistics.row_bytes(n_blocks(vocab), o.return_entropy),
    )
    # every 512 columns the statistics begin at a multiple of 16 bytes
    return replace(plan, cols=(plan.cols // 512 * 512 or plan.cols) if low else vocab)

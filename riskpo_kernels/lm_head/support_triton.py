"""linear_logprob under a support by the Triton kernels: two launches forward, up to four back.

    pair_logits_kernel    the logits of all pairs (row, id) [P], kept for the backward
    pair_rows_kernel      each row's softmax
    pair_dz_kernel        their gradients
    segment_kernel        dH by rows; dW and dbias by ids, after a stable sort

A pair has id -1 where its row is ignored or is sent no gradient, in padding, and where the id is
another rank's. Nothing is compacted, so that sizes are known without asking the device. Each pair
takes 4 bytes until the backward and about 50 in it, whatever memory_mib is; dH and dW are written
once, in their own dtypes (dH of a shard in float32, until ranks are summed).
"""

from __future__ import annotations

from typing import Any

import torch

from riskpo_kernels.core.gradient import RowGradient
from riskpo_kernels.core.process_groups import sum_over
from riskpo_kernels.core.softmax import IGNORED, LogitMap, RowState, finish
from riskpo_kernels.kernels import readable
from riskpo_kernels.kernels.support_gradient import pair_gradients, segment_sums
from riskpo_kernels.kernels.support_pairs import Pairs, fold_pairs, pair_logits
from riskpo_kernels.lm_head.vocab_parallel import VocabShard

Tensors = tuple[Any, ...]  # hidden, weight, bias, target, row_temperature, ids, offsets


def forward(
    tensors: Tensors,
    map: LogitMap,
    ignore_index: int | None,
    shard: VocabShard | None,
    entropy: bool,
) -> tuple[Any, ...]:
    """logprob, entropy, lse, peak, log_sum [N], and the logits [P] of this rank's columns."""
    hidden, target = tensors[0], tensors[3]
    live, first = _live(target, ignore_index), 0 if shard is None else shard.offset
    pairs = pairs_of(tensors, live, first)
    local = torch.where(live, target.long() - first, IGNORED)
    with torch.cuda.device_of(hidden):
        x = pair_logits(readable(hidden), readable(tensors[1]), tensors[2], pairs)
        wanted = (True, entropy, True, True, shard is None)
        rows = [x.new_empty(target.shape) if yes else None for yes in wanted]
        fold_pairs(x, pairs, local, map, rows)
    if shard is None:
        return *rows, x
    m, u, s, z_t, _ = rows
    assert m is not None and s is not None and z_t is not None
    state = RowState(m, s, u, z_t)
    shard.merge(state)
    logprob, spread, peak, log_sum = finish(state)
    found = (logprob, spread, peak + log_sum, peak, log_sum)
    return *(None if y is None else torch.where(live, y, 0.0) for y in found), x


def backward(
    needs: list[bool],
    tensors: Tensors,
    map: LogitMap,
    ignore_index: int | None,
    shard: VocabShard | None,
    x: torch.Tensor,
    up: RowGradient,
) -> tuple[torch.Tensor | None, ...]:
    """dH, dW and dbias, None where none is needed; x: the forward's logits."""
    hidden, weight, bias, target = tensors[:4]
    first = 0 if shard is None else shard.offset
    pairs = pairs_of(tensors, up.live() & _live(target, ignore_index), first)
    dh = dw = db = None
    with torch.cuda.device_of(hidden):
        dz = pair_gradients(x, pairs, target.long() - first, map, up)
        if needs[0]:
            dtype = hidden.dtype if shard is None else torch.float32
            dh = torch.empty(hidden.shape, dtype=dtype, device=x.device)
            segment_sums(readable(weight), pairs.ids, dz, pairs.first, None, dh)
        if any(needs[1:]):
            rows, dz, begin, ids = _by_id(pairs, dz, weight.shape[0])
            if needs[1]:
                dw = torch.zeros_like(weight, memory_format=torch.contiguous_format)
                segment_sums(readable(hidden), rows, dz, begin, ids, dw)
            if needs[2] and bias is not None:
                db = torch.zeros_like(bias, memory_format=torch.contiguous_format)
                segment_sums(x.new_ones(1, 1), torch.zeros_like(rows), dz, begin, ids, db[:, None])
    if dh is not None and shard is not None:
        dh = sum_over(shard.group, dh).to(hidden.dtype)
    return dh, dw, db


def pairs_of(tensors: Tensors, live: torch.Tensor, first: int) -> Pairs:
    """The pairs of a support. Those of rows that are not live [N], and ids that are not among the
    columns of a weight whose first is column `first`, have id -1."""
    weight, ids, offsets = tensors[1], *tensors[5:]
    every = torch.arange(live.numel() + 1, device=ids.device)
    starts = every * ids.shape[1] if offsets is None else offsets.long().contiguous()
    rows = every[:-1].int().repeat_interleave(starts.diff(), output_size=ids.numel())
    ids = ids.reshape(-1).long()
    here = (ids >= first) & (ids < first + weight.shape[0]) & live[rows]
    return Pairs(torch.where(here, ids - first, -1).int(), rows, starts)


def _live(target: torch.Tensor, ignore_index: int | None) -> torch.Tensor:
    """Rows that are not ignored, bool."""
    return target.long() != (IGNORED if ignore_index is None else ignore_index)


def _by_id(
    pairs: Pairs, dz: torch.Tensor, vocab: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and dz of the pairs in the order of their ids, where runs of one id begin, and the ids;
    as many runs as there can be, and those without an id last."""
    ids, order = torch.where(pairs.ids < 0, vocab, pairs.ids).sort(stable=True)
    run = (ids[1:] != ids[:-1]).cumsum(0)
    run = torch.nn.functional.pad(run, (1, 0))[: ids.numel()]
    most = torch.arange(min(ids.numel(), vocab) + 1, device=ids.device)
    return pairs.rows[order], dz[order], torch.searchsorted(run, most), ids

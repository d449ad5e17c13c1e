"""linear_logprob under a sampler's support: the softmax over the ids that a row keeps.

    z = softcap(scale * (h W^T + b)) / T over the kept ids      everything else as over all ids

The same statistics, gradients and merge over ranks as for the whole vocabulary
(core/softmax.py), on the few columns of lm_head/gathered.py or, in Triton, on the pairs of
lm_head/support_triton.py. A target outside its row's support has log-prob -inf, a constant.
"""

from __future__ import annotations

from typing import Any

import torch

from riskpo_kernels.core.checks import (
    check_device,
    check_shape,
    describe,
    live_rows,
    reject,
)
from riskpo_kernels.core.gradient import RowGradient, gradient
from riskpo_kernels.core.matmul import Head, Options, put_among, wide_of
from riskpo_kernels.core.operators import differentiable
from riskpo_kernels.core.softmax import RowState, RowStats, finish, fold
from riskpo_kernels.lm_head.gathered import (
    SAME,
    Lists,
    Piece,
    finish_sums,
    new_sums,
    pieces,
)
from riskpo_kernels.lm_head.operator import LSE, OP, SENT
from riskpo_kernels.lm_head.vocab_parallel import VocabShard, find_shard

Support = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
OUTSIDE = ("raise", "-inf")
PADDING = -1


def check_support(
    support: object, rows: tuple[int, ...], target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The operator's (ids, offsets) of what a caller gave: ids [N, K], or [P] with offsets."""
    if target.dim() > len(rows):
        todo = "Call it once for each of them."
        reject(OP, "support with several targets a row", "one target a row", todo)
    if isinstance(support, torch.Tensor):
        ids, offsets = support, None
        if ids.dim() != len(rows) + 1 or tuple(ids.shape[:-1]) != rows:
            came = f"support = {describe(ids)}"
            reject(OP, came, f"ids {[*rows, 'K']}, padded with -1", "Give each target its row.")
        ids = ids.reshape(-1, ids.shape[-1])
    elif isinstance(support, (tuple, list)) and len(support) == 2:
        ids, offsets = support
        if not (isinstance(ids, torch.Tensor) and isinstance(offsets, torch.Tensor)):
            reject(OP, f"support of {type(ids).__name__}", "two tensors", "Make them tensors.")
        check_shape(OP, "support's token_ids", ids, (ids.numel(),), "one dimension")
        n = target.numel()
        check_shape(OP, "support's offsets", offsets, (n + 1,), "one per target and the end")
    else:
        todo = "See linear_logprob's docstring."
        reject(OP, f"support = {type(support).__name__}", "(token_ids, offsets), or ids", todo)
    check_device(OP, target=target, token_ids=ids, offsets=offsets)
    for x in (ids, offsets):
        if x is not None and (x.is_floating_point() or x.dtype == torch.bool):
            reject(OP, f"support with {describe(x)}", "integers", "Convert with .long().")
    return ids, offsets


def lists_of(ids: torch.Tensor, offsets: torch.Tensor | None) -> Lists:
    """The rows' ids as one list."""
    ids = ids.long()
    if offsets is None:
        there = ids != PADDING
        counts = there.sum(1)
        return Lists(ids[there], counts.cumsum(0) - counts, counts)
    offsets = offsets.long()
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != ids.numel() or bool((offsets.diff() < 0).any()):
        came = f"support's offsets from {ends[0]} to {ends[-1]} for {ids.numel()} token_ids"
        reject(OP, came, "0 first, their number last, none below the one before", "")
    return Lists(ids, offsets[:-1], offsets.diff())


def check_lists(
    ids: torch.Tensor,
    offsets: torch.Tensor | None,
    vocab: int,
    target: torch.Tensor,
    ignore_index: int | None,
) -> Lists:
    """ids in the vocabulary, none twice in a row, none of the live rows empty."""
    lists = lists_of(ids, offsets)
    n, flat = lists.counts.numel(), lists.ids
    row = torch.arange(n, device=flat.device).repeat_interleave(lists.counts)
    ordered = (row * vocab + flat).sort().values
    none = lists.counts == 0
    if ignore_index is not None:
        none &= target.reshape(-1) != ignore_index
    wrong = ((flat < 0) | (flat >= vocab)).sum(), (ordered.diff() == 0).sum(), none.sum()
    outside, twice, empty = torch.stack(wrong).tolist()
    if outside:
        came = f"{outside} ids of support outside the vocabulary"
        reject(OP, came, f"ids in [0, {vocab})", "Pad with -1, and only ids of shape [N, K].")
    if twice:
        reject(OP, f"{twice} ids twice in a row of support", "each once", "Drop the copies.")
    if empty:
        todo = "Set the target of a row without a sampled token to ignore_index."
        reject(OP, f"{empty} targets with an empty support", "at least the target itself", todo)
    return lists


def _problem(
    tensors: tuple[Any, ...], o: Options, *, check: bool
) -> tuple[Head, Lists, VocabShard | None]:
    """The live rows' head and lists, both of this rank's columns."""
    hidden, weight, bias, target, row_temperature, ids, offsets = tensors
    shard = find_shard(hidden, weight, target, o)
    first, vocab = (shard.offset, shard.total) if shard else (0, weight.shape[0])
    checked = 1.0 if row_temperature is None else row_temperature
    keep, found = live_rows(OP, target, vocab, o.ignore_index, checked)
    if check:
        lists = check_lists(ids, offsets, vocab, target, o.ignore_index).of(keep)
    else:
        lists = lists_of(ids, offsets).of(keep)
    if shard is not None:
        lists = lists.within(first, weight.shape[0])
    map = o.map(row_temperature, wide_of(hidden, weight))
    map = map if keep is None else map.of(keep)
    return Head(hidden, weight, bias, keep, found - first, map), lists, shard


def check_inside(logprob: torch.Tensor) -> None:
    """ValueError where a target is not in its row's support."""
    outside = int(logprob.isneginf().sum())
    if outside:
        todo = "Keep the sampled token, or pass outside_support='-inf'."
        reject(OP, f"{outside} targets outside their support", "every target in it", todo)


def _place(piece: Piece, head: Head) -> torch.Tensor:
    """Where among its row's columns a target is [R]; -1 if it is not."""
    same = (piece.ids == head.target[piece.rows][:, None]) & (piece.ids >= 0)
    return torch.where(same.any(1), same.int().argmax(1), -1)


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_temperature: torch.Tensor | None,
    ids: torch.Tensor,
    offsets: torch.Tensor | None,
    o: Options,
) -> tuple[torch.Tensor, ...]:
    """logprob, entropy, lse, peak, log_sum, and of the Triton backend the pairs' logits"""
    tensors = (hidden, weight, bias, target, row_temperature, ids, offsets)
    o, wide = o.resolved(hidden, weight, tiled=False), wide_of(hidden, weight)
    head, lists, shard = _problem(tensors, o, check=True)
    if o.backend == "triton":
        from riskpo_kernels.lm_head import support_triton  # needs Triton

        map = o.map(row_temperature, wide)
        rows = support_triton.forward(tensors, map, o.ignore_index, shard, o.return_entropy)
    else:
        state = RowState.new(head.n, o.return_entropy, hidden, wide)
        for piece in pieces(head, lists, o.memory_mib):
            part = state.of(piece.rows)
            fold(piece.z, _place(piece, head), None, part, SAME)
            state.put(piece.rows, part)
        if shard is not None:
            shard.merge(state)
        logprob, entropy, peak, log_sum = finish(state)
        n, found = target.shape[0], (logprob, entropy, peak + log_sum, peak, log_sum)
        rows = (*(None if x is None else put_among(head.rows, n, x) for x in found), None)
    if o.raises:
        check_inside(rows[0])
    return tuple(hidden.new_empty(0, dtype=wide) if x is None else x for x in rows)


def _forward_fake(*given: Any) -> tuple[torch.Tensor, ...]:
    hidden, weight, _, target, _, ids, _, o = given
    o, n = o.resolved(hidden, weight, tiled=False), target.shape[0]
    pairs = ids.numel() if o.backend == "triton" else 0
    sizes = (n, n if o.return_entropy else 0, n, n, n, pairs)
    return tuple(hidden.new_empty(size, dtype=wide_of(hidden, weight)) for size in sizes)


def _backward(
    needs: list[bool],
    upstream: tuple[torch.Tensor | None, ...],
    tensors: tuple[Any, ...],
    found: tuple[torch.Tensor, ...],
    o: Options,
) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, _, target, row_temperature, *_ = tensors
    o, wide = o.resolved(hidden, weight, tiled=False), found[0].dtype
    *rows, kept = found
    stats = RowStats(*rows)
    c, g, e = (None if x is None else x.to(wide) for x in upstream)
    if c is not None:
        c = c.masked_fill(stats.logprob == -torch.inf, 0.0)  # a constant there
    if not o.return_entropy:
        g, stats = None, stats._replace(entropy=None)
    if o.backend == "triton":
        from riskpo_kernels.lm_head import support_triton  # needs Triton

        map = o.map(row_temperature, wide)
        up = RowGradient.new(stats, c, g, e, map)
        shard = find_shard(hidden, weight, target, o)
        return support_triton.backward(needs, tensors, map, o.ignore_index, shard, kept, up)
    head, lists, _ = _problem(tensors, o, check=False)
    if head.rows is not None:
        c, g, e = (None if x is None else x[head.rows] for x in (c, g, e))
        stats = stats.of(head.rows)
    up = RowGradient.new(stats, c, g, e, head.map)
    lists = Lists(lists.ids, lists.starts, lists.counts * up.live())
    sums = new_sums(head, needs)
    for piece in pieces(head, lists, o.memory_mib):
        dz = gradient(piece.z, _place(piece, head), None, up.of(piece.rows), SAME, piece.z)
        piece.send(dz, sums, deterministic=o.deterministic)
    return finish_sums(head, sums, o.group)


support_operator = differentiable(
    f"{OP}_support",
    _forward,
    _backward,
    Options,
    fake=_forward_fake,
    results=6,
    sent=SENT,
    unsaved=LSE,
)

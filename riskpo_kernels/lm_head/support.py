"""linear_logprob under a sampler's support: the softmax over the ids that a row keeps.

    z = softcap(scale * (h W^T + b)) / T over the kept ids      everything else as over all ids

The same statistics, gradients and merge over ranks as for the whole vocabulary
(core/softmax.py), on the few columns of lm_head/gathered.py or, in Triton, on the pairs of
lm_head/support_triton.py. A target outside its row's support has log-prob -inf, a constant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from riskpo_kernels.core.backends import choose
from riskpo_kernels.core.checks import check_device, check_shape, describe, live_rows, reject
from riskpo_kernels.core.matmul import exact_products
from riskpo_kernels.core.operators import (
    gradients_fake,
    gradients_through,
    register,
    schema_of,
)
from riskpo_kernels.core.softmax import RowGradient, RowState, RowStats, finish, fold, gradient
from riskpo_kernels.lm_head.gathered import (
    SAME,
    Lists,
    Piece,
    finish_sums,
    new_sums,
    pieces,
)
from riskpo_kernels.lm_head.operator import (
    OP,
    find_shard,
    map_of,
    put_among,
    saving,
    wide_of,
)
from riskpo_kernels.lm_head.tiles import Head, Options
from riskpo_kernels.lm_head.vocab_parallel import VocabShard

Support = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
OUTSIDE = ("raise", "-inf")
PADDING = -1


@dataclass(frozen=True)
class Words:
    """What is not a tensor."""

    ignore_index: int | None
    group: str
    scale: float
    softcap: float | None
    temperature: float
    return_entropy: bool
    backend: str
    memory_mib: float
    deterministic: bool
    raises: bool

    @staticmethod
    def of(hidden: torch.Tensor, weight: torch.Tensor, numbers: tuple[Any, ...]) -> Words:
        """With the backend that runs."""
        w, dtype = Words(*numbers), torch.promote_types(hidden.dtype, weight.dtype)
        return replace(w, backend=choose(OP, w.backend, hidden.device, dtype))

    @property
    def options(self) -> Options:
        numbers = (self.scale, self.softcap, self.temperature, self.return_entropy)
        rest = (self.memory_mib, 0.0, self.deterministic, False)
        return Options(*numbers, self.backend, *rest)


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
    tensors: tuple[Any, ...], w: Words, *, check: bool
) -> tuple[Head, Lists, VocabShard | None]:
    """The live rows' head and lists, both of this rank's columns."""
    hidden, weight, bias, target, row_temperature, ids, offsets = tensors
    shard = find_shard(w.group, hidden, weight, target, w.options)
    first, vocab = (shard.offset, shard.total) if shard else (0, weight.shape[0])
    checked = 1.0 if row_temperature is None else row_temperature
    keep, found = live_rows(OP, target, vocab, w.ignore_index, checked)
    if check:
        lists = check_lists(ids, offsets, vocab, target, w.ignore_index).of(keep)
    else:
        lists = lists_of(ids, offsets).of(keep)
    if shard is not None:
        lists = lists.within(first, weight.shape[0])
    map = map_of(w.options, row_temperature, wide_of(hidden, weight))
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
    *numbers: Any,
) -> tuple[torch.Tensor, ...]:
    tensors = (hidden, weight, bias, target, row_temperature, ids, offsets)
    w, wide = Words.of(hidden, weight, numbers), wide_of(hidden, weight)
    head, lists, shard = _problem(tensors, w, check=True)
    empty = hidden.new_empty(0, dtype=wide)
    if w.backend == "triton":
        from riskpo_kernels.lm_head import support_triton  # needs Triton

        map = map_of(w.options, row_temperature, wide)
        found = support_triton.forward(tensors, map, w.ignore_index, shard, w.return_entropy)
        if w.raises:
            check_inside(found[0])
        return tuple(empty if x is None else x for x in found)
    state = RowState.new(head.n, w.return_entropy, hidden, wide)
    with exact_products(hidden.device):
        for piece in pieces(head, lists, w.memory_mib):
            part = state.of(piece.rows)
            fold(piece.z, _place(piece, head), None, part, SAME)
            for x, y in zip(state, part, strict=True):
                if x is not None and y is not None:
                    x[piece.rows] = y
        if shard is not None:
            shard.merge(state)
        logprob, entropy, peak, log_sum = finish(state)
    if w.raises:
        check_inside(logprob)
    rows = (logprob, entropy, peak + log_sum, peak, log_sum)
    n = target.shape[0]
    return *(empty if x is None else put_among(head.rows, n, x) for x in rows), empty.clone()


def _forward_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    hidden, weight, _, target = args[:4]
    n, dtype, w = target.shape[0], wide_of(hidden, weight), Words.of(hidden, weight, args[7:])
    kept = args[5].numel() if w.backend == "triton" else 0
    sizes = (n, n if w.return_entropy else 0, n, n, n, kept)
    return tuple(hidden.new_empty(size, dtype=dtype) for size in sizes)


def _backward(
    needs: list[bool],
    c: torch.Tensor | None,
    g: torch.Tensor | None,
    e: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_temperature: torch.Tensor | None,
    ids: torch.Tensor,
    offsets: torch.Tensor | None,
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    peak: torch.Tensor,
    log_sum: torch.Tensor,
    kept: torch.Tensor,  # logits of the pairs, of the Triton backend
    *numbers: Any,
) -> tuple[torch.Tensor, ...]:
    tensors = (hidden, weight, bias, target, row_temperature, ids, offsets)
    w = Words.of(hidden, weight, numbers)
    stats = RowStats(logprob, entropy, peak, log_sum)
    wide = stats.logprob.dtype
    c, g, e = (None if x is None else x.to(wide) for x in (c, g, e))
    if c is not None:
        c = c.masked_fill(stats.logprob == -torch.inf, 0.0)  # a constant there
    if not w.return_entropy:
        g, stats = None, stats._replace(entropy=None)
    if w.backend == "triton":
        from riskpo_kernels.lm_head import support_triton  # needs Triton

        map = map_of(w.options, row_temperature, wide)
        up = RowGradient.new(stats, c, g, e, map)
        shard = find_shard(w.group, hidden, weight, target, w.options)
        return support_triton.backward(needs, tensors, map, w.ignore_index, shard, kept, up)
    head, lists, _ = _problem(tensors, w, check=False)
    if head.rows is not None:
        c, g, e = (None if x is None else x[head.rows] for x in (c, g, e))
        stats = stats.of(head.rows)
    up = RowGradient.new(stats, c, g, e, head.map)
    lists = Lists(lists.ids, lists.starts, lists.counts * up.live())
    sums = new_sums(head, needs)
    with exact_products(hidden.device):
        for piece in pieces(head, lists, w.memory_mib):
            dz = gradient(piece.z, _place(piece, head), None, up.of(piece.rows), SAME, piece.z)
            piece.send(dz, sums, deterministic=w.deterministic)
    return finish_sums(head, sums, w.group)


_backward_operator = register(
    "linear_logprob_support_backward",
    schema_of(_backward, Words, 3),
    _backward,
    fake=gradients_fake,
)


support_operator = register(
    "linear_logprob_support",
    schema_of(_forward, Words, 6),
    _forward,
    fake=_forward_fake,
    setup_context=saving(7, 3, skip=2),
    backward=gradients_through(_backward_operator, 3),
)

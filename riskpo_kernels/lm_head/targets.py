"""linear_logprob of K targets a row: one pass for the likeliest of them, gathered logits for all.

The row's likeliest target, k*, is the target of the pass over the vocabulary (lm_head/operator.py):
its log-prob is exact however close it is to 0. No other target has more than half of the
probability, so that (z_k - peak) - log_sum loses nothing. With the upstream gradients c_k

    dz_v = the pass's own of c_k* and e - sum_{k != k*} c_k        dz_t(k) += c_k      k != k*

Beside the pass this costs 3 N K D multiply-adds (lm_head/gathered.py), one host synchronisation a
pass and, with vocab_group, an all_gather and an all_reduce of [N, K]. Gradients are summed in
float32 before they are rounded, in one buffer as wide for each of dH and dW.
"""

from __future__ import annotations

from typing import Any

import torch

from riskpo_kernels.core.checks import live_rows
from riskpo_kernels.core.matmul import Head, Options, wide_of
from riskpo_kernels.core.operators import differentiable
from riskpo_kernels.core.process_groups import max_over
from riskpo_kernels.lm_head.backward_operator import backward_sums
from riskpo_kernels.lm_head.gathered import Lists, finish_sums, pieces
from riskpo_kernels.lm_head.operator import LSE, OP, RESULTS, SENT, forward, forward_fake
from riskpo_kernels.lm_head.vocab_parallel import find_shard


def _live(target: torch.Tensor, ignore_index: int | None) -> torch.Tensor:
    everything = torch.ones_like(target, dtype=torch.bool)
    return everything if ignore_index is None else target != ignore_index


def _head(tensors: tuple[Any, ...], o: Options, wide: torch.dtype) -> Head:
    hidden, weight, bias, target, row_temperature = tensors
    return Head(hidden, weight, bias, None, target[:, 0], o.map(row_temperature, wide))


def _local(target: torch.Tensor, wanted: torch.Tensor, offset: Any, columns: int) -> Lists:
    """The wanted ids as columns of this rank's head, -1 for the others."""
    ids = target.long() - offset
    return Lists.square(ids.masked_fill(~wanted | (ids < 0) | (ids >= columns), -1))


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_temperature: torch.Tensor | None,
    o: Options,
) -> tuple[torch.Tensor, ...]:
    wide = wide_of(hidden, weight)
    shard = find_shard(hidden, weight, target, o.resolved(hidden, weight))
    offset, vocab = (shard.offset, shard.total) if shard else (0, weight.shape[0])
    live_rows(OP, target.reshape(-1), vocab, o.ignore_index)
    live = _live(target, o.ignore_index)
    head = _head((hidden, weight, bias, target, row_temperature), o, wide)
    z = torch.full(target.shape, -torch.inf, dtype=wide, device=hidden.device)
    rows = live.any(1)
    lists = _local(target, live, offset, weight.shape[0])
    lists = Lists(lists.ids, lists.starts, lists.counts * rows)
    for piece in pieces(head, lists, o.memory_mib):
        z[piece.rows, piece.columns] = piece.z
    if shard is not None:
        max_over(shard.group, z)
    first = target.gather(1, z.argmax(1, keepdim=True))
    found = forward(hidden, weight, bias, first[:, 0], row_temperature, o)
    first_logprob, entropy, lse, peak, log_sum, *rest = found
    logprob = (z - peak[:, None]).sub_(log_sum[:, None]).clamp_(max=0.0)
    logprob = torch.where(target == first, first_logprob[:, None], logprob)
    logprob = logprob.masked_fill_(~live, 0.0)
    return logprob, entropy, lse, first[:, 0], first_logprob, peak, log_sum, *rest


def _forward_fake(*given: Any) -> tuple[torch.Tensor, ...]:
    hidden, weight, bias, target, *rest = given
    found = forward_fake(hidden, weight, bias, target[:, 0], *rest)
    logprob = hidden.new_empty(target.shape, dtype=found[0].dtype)
    return logprob, found[1], found[2], torch.empty_like(target[:, 0]), *found[:1], *found[3:]


def _backward(
    needs: list[bool],
    upstream: tuple[torch.Tensor | None, ...],
    tensors: tuple[Any, ...],
    found: tuple[torch.Tensor, ...],
    o: Options,
) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, bias, target, row_temperature = tensors
    # the likeliest target, its log-prob, and what the pass keeps
    logprob, entropy, first, first_logprob, *kept = found
    (c, g, e), wide = upstream, logprob.dtype
    others, mine = torch.zeros_like(logprob), None
    if c is not None:
        c = c.to(wide).masked_fill(~_live(target, o.ignore_index), 0.0)
        same = target == first[:, None]
        mine, others = (c * same).sum(1), c.masked_fill(same, 0.0)
        e = -others.sum(1) if e is None else e.to(wide) - others.sum(1)
    pass_of = (hidden, weight, bias, first, row_temperature)
    passed = (first_logprob, entropy, *kept)
    sums = list(backward_sums(needs, (mine, g, e), pass_of, passed, o, wide=True))
    head = _head(tensors, o, wide)
    factor = (head.map.scale / head.map.column()) * others
    offset = kept[-2] if o.group else 0  # else an order of columns, if anything
    lists = _local(target, others != 0, offset, weight.shape[0])
    lists = Lists(lists.ids, lists.starts, lists.counts * (others != 0).any(1))
    for piece in pieces(head, lists, o.memory_mib):
        dz = factor[piece.rows, piece.columns]
        piece.send(dz, sums, deterministic=o.deterministic)
    return finish_sums(head, sums, o.group)


targets_operator = differentiable(
    f"{OP}_targets",
    _forward,
    _backward,
    Options,
    fake=_forward_fake,
    results=RESULTS + 2,
    sent=SENT,
    unsaved=LSE,
)

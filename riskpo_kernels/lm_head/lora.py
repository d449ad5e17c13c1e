"""linear_logprob of a frozen head with an adapter of low rank on it (LoRA), never merged.

    raw = h W^T + factor (h A^T) B^T

The pass is that of lm_head/operator.py over the columns of core/low_rank.py; W gets no gradient,
so that the backward's product for dW has the rank's columns only. With du = dz B, summed over the
vocabulary like dz W, the gradients are

    dH = dz W + factor du A      dA = factor du^T h      dB = dz^T u

dH is summed in one float32 buffer [N, D + width] and rounded once; A's and B's sums are float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from riskpo_kernels.core.checks import check_device, check_float, check_shape, reject
from riskpo_kernels.core.low_rank import LowRank, filled
from riskpo_kernels.core.matmul import (
    SIXTEEN_BIT,
    WHOLE_TILE,
    Options,
    Products,
    padded,
    spans,
    wide_of,
)
from riskpo_kernels.core.operators import differentiable
from riskpo_kernels.core.process_groups import group_called, sum_over
from riskpo_kernels.lm_head.backward_operator import backward_sums
from riskpo_kernels.lm_head.operator import LSE, OP, RESULTS, SENT, forward, forward_fake

Lora = tuple[torch.Tensor, torch.Tensor, float]
ROWS = 4096  # of hidden states that are widened at a time


def check_lora(lora: object, hidden: torch.Tensor, weight: torch.Tensor, columns: bool) -> None:
    """(A [r, D], B [V, r], a finite factor), of floats, beside a frozen weight; no chosen columns
    (support, several targets a row)."""
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        came = f"lora = {type(lora).__name__}"
        reject(OP, came, "(A [r, D], B [V, r], factor)", "peft's lora_alpha / r is the factor.")
    a, b, factor = lora
    for name, x in (("lora's A", a), ("lora's B", b)):
        check_float(OP, name, x)
        wide = x.dtype == torch.float32 and hidden.dtype in SIXTEEN_BIT
        if x.dtype != hidden.dtype and not wide:
            came = f"{name} {x.dtype} with hidden {hidden.dtype}"
            reject(OP, came, "hidden's dtype, or float32 beside 16 bits", "Cast it.")
    check_device(OP, hidden=hidden, A=a, B=b)
    rank = a.shape[0] if a.dim() == 2 else 0
    check_shape(OP, "lora's A", a, (max(rank, 1), hidden.shape[-1]), "rank and hidden's width")
    check_shape(OP, "lora's B", b, (weight.shape[0], rank), "rows of weight and A's rank")
    if not isinstance(factor, (int, float)) or not math.isfinite(factor):
        reject(OP, f"lora's factor = {factor!r}", "a finite number", "It is lora_alpha / r.")
    if weight.requires_grad:
        todo = "Pass weight.detach(), or merge the adapter into a weight that is trained."
        reject(OP, "lora beside a weight that requires grad", "a frozen weight", todo)
    if columns:
        came = "lora with support or several targets a row"
        reject(OP, came, "one target a row over the whole vocabulary", "Merge the adapter for it.")


def _low_rank(
    hidden: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    weight: torch.Tensor,
    o: Options,
) -> LowRank:
    products, wide = Products(hidden.device, hidden.dtype, weight.dtype), wide_of(hidden, weight)
    pad = _pad_of(hidden, o)
    if pad:  # a BLAS rounds by a row's place where a product's depth is no multiple of 4
        a, b = filled(a.T, 4).T, filled(b, 4)
    u, down = hidden.new_empty(hidden.shape[0], len(a), dtype=wide), a.to(wide).T * o.factor
    for s in spans(hidden.shape[0], pad or ROWS):
        u[s] = _times(hidden[s], down, pad)
    return LowRank(u, b, products.dtype)


def _times(x: torch.Tensor, m: torch.Tensor, pad: int) -> torch.Tensor:
    """x m, as part of a product of `pad` rows where a row's bits may not depend on how many there
    are, nor on its place among them, by which a BLAS rounds in products of few columns."""
    wide = filled(m, 16) if pad else m
    return (padded(x.to(m.dtype), pad) @ wide)[: x.shape[0], : m.shape[1]]


def _pad_of(hidden: torch.Tensor, o: Options) -> int:
    return WHOLE_TILE["cuda" if hidden.is_cuda else "cpu"][0] if o.deterministic else 0


def _forward(
    hidden: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    target: torch.Tensor,
    row_temperature: torch.Tensor | None,
    o: Options,
) -> tuple[torch.Tensor, ...]:
    low_rank = _low_rank(hidden, a, b, weight, o)
    return forward(hidden, weight, bias, target, row_temperature, o, low_rank=low_rank)


def _forward_fake(*given: Any) -> tuple[torch.Tensor, ...]:
    hidden, _, _, bias, weight, *rest = given
    return forward_fake(hidden, weight, bias, *rest)


def _backward(
    needs: list[bool],
    upstream: tuple[torch.Tensor | None, ...],
    tensors: tuple[Any, ...],
    found: tuple[torch.Tensor, ...],
    o: Options,
) -> tuple[torch.Tensor | None, ...]:
    hidden, a, b, bias, weight, *rest = tensors
    low_rank = _low_rank(hidden, a, b, weight, o)
    sums = [needs[0] or needs[1], *needs[2:]]
    pass_of = (hidden, weight, bias, *rest)
    dh, db, dbias = backward_sums(sums, upstream, pass_of, found, o, wide=True, low_rank=low_rank)
    dhidden = da = None
    if dh is not None:
        dh = sum_over(group_called(o.group), dh) if o.group else dh
        dhidden, da = _of_rows(dh, hidden, a, low_rank, o, needs)
    return (
        dhidden,
        None if da is None else da.to(a.dtype),
        None if db is None else low_rank.of_b(db)[:, : len(a)].to(b.dtype),
        None if dbias is None else dbias.to(bias.dtype),
    )


def _of_rows(
    dh: torch.Tensor,
    hidden: torch.Tensor,
    a: torch.Tensor,
    low_rank: LowRank,
    o: Options,
    needs: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dH [N, D] rounded, dA [r, D] of the sums [N, D + width], where needed."""
    width, wide, pad = hidden.shape[1], dh.dtype, _pad_of(hidden, o)
    dhidden = torch.empty_like(hidden) if needs[0] else None
    da = torch.zeros_like(a, dtype=wide) if needs[1] else None
    up = a.to(wide) * o.factor
    for s in spans(hidden.shape[0], pad or ROWS):
        du = low_rank.of_u(dh[s, width:])[:, : len(a)]
        if dhidden is not None:
            dhidden[s] = _times(du, up, pad).add_(dh[s, :width])
        if da is not None:
            live = du.ne(0).any(1, keepdim=True)  # another row is not read: a NaN in it stays there
            da.addmm_(du.T, torch.where(live, hidden[s].to(wide), 0.0), alpha=o.factor)
    return dhidden, da


lora_operator = differentiable(
    f"{OP}_lora",
    _forward,
    _backward,
    Options,
    fake=_forward_fake,
    results=RESULTS,
    sent=SENT,
    unsaved=LSE,
    gradients=4,
)

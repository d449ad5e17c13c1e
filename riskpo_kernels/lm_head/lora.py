"""linear_logprob of a frozen head with an adapter of low rank on it (LoRA), never merged.

    raw = h W^T + factor (h A^T) B^T

The pass is that of lm_head/operator.py over the columns of lm_head/low_rank.py; W gets no gradient,
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
from riskpo_kernels.core.matmul import SIXTEEN_BIT, Products, exact_products, spans
from riskpo_kernels.core.operators import (
    gradients_fake,
    gradients_through,
    register,
    schema_of,
)
from riskpo_kernels.core.process_groups import group_called, sum_over
from riskpo_kernels.lm_head.low_rank import LowRank
from riskpo_kernels.lm_head.operator import (
    OP,
    RESULTS,
    backward_sums,
    forward,
    forward_fake,
    saving,
    wide_of,
)
from riskpo_kernels.lm_head.tiles import WHOLE_TILE, Options, padded

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
    factor: float,
    pad: int,
) -> LowRank:
    products, wide = Products(hidden.device, hidden.dtype, weight.dtype), wide_of(hidden, weight)
    if pad:  # a BLAS rounds by a row's place where a product's depth is no multiple of 4
        a, b = _filled(a.T, 4).T, _filled(b, 4)
    u, down = hidden.new_empty(hidden.shape[0], len(a), dtype=wide), a.to(wide).T * factor
    for s in spans(hidden.shape[0], pad or ROWS):
        u[s] = _times(hidden[s], down, pad)
    return LowRank(u, b, products.dtype)


def _times(x: torch.Tensor, m: torch.Tensor, pad: int) -> torch.Tensor:
    """x m, as part of a product of `pad` rows where a row's bits may not depend on how many there
    are, nor on its place among them, by which a BLAS rounds in products of few columns."""
    wide = _filled(m, 16) if pad else m
    return (padded(x.to(m.dtype), pad) @ wide)[: x.shape[0], : m.shape[1]]


def _filled(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """x with columns of zeros up to a multiple."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % multiple))


def _pad_of(hidden: torch.Tensor, numbers: tuple[Any, ...]) -> int:
    rows = WHOLE_TILE["cuda" if hidden.is_cuda else "cpu"][0]
    return rows if Options(*numbers).deterministic else 0


def _forward(
    hidden: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    target: torch.Tensor,
    row_temperature: torch.Tensor | None,
    factor: float,
    ignore_index: int | None,
    group: str,
    *numbers: Any,
) -> tuple[torch.Tensor, ...]:
    with exact_products(hidden.device):
        low_rank = _low_rank(hidden, a, b, weight, factor, _pad_of(hidden, numbers))
    tensors = hidden, weight, bias, target, row_temperature
    return forward(*tensors, ignore_index, group, *numbers, low_rank=low_rank)


def _forward_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    hidden, _, _, bias, weight, target, row_temperature, _, *rest = args
    return forward_fake(hidden, weight, bias, target, row_temperature, *rest)


def _backward(
    needs: list[bool],
    c: torch.Tensor | None,
    g: torch.Tensor | None,
    e: torch.Tensor | None,
    hidden: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
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
    factor: float,
    ignore_index: int | None,
    group: str,
    *numbers: Any,
) -> tuple[torch.Tensor, ...]:
    passed = (logprob, entropy, peak, log_sum, bits, dense, pairs, offset, kept)
    pass_of = (hidden, weight, bias, target, row_temperature, *passed, ignore_index, group)
    rows, nothing = needs[0] or needs[1], hidden.new_empty(0)
    pad = _pad_of(hidden, numbers)
    with exact_products(hidden.device):
        low_rank = _low_rank(hidden, a, b, weight, factor, pad)
        sums = [rows, needs[2], needs[3]]
        dh, db, dbias = backward_sums(
            sums, c, g, e, *pass_of, *numbers, wide=True, low_rank=low_rank
        )
        dhidden = da = None
        if dh is not None:
            dh = sum_over(group_called(group), dh) if group else dh
            dhidden, da = _of_rows(dh, hidden, a, low_rank, factor, needs, pad)
    return (
        nothing if dhidden is None else dhidden,
        nothing if da is None else da.to(a.dtype),
        nothing if db is None else low_rank.of_b(db)[:, : len(a)].to(b.dtype),
        nothing if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def _of_rows(
    dh: torch.Tensor,
    hidden: torch.Tensor,
    a: torch.Tensor,
    low_rank: LowRank,
    factor: float,
    needs: list[bool],
    pad: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dH [N, D] rounded, dA [r, D] of the sums [N, D + width], where needed."""
    width, wide = hidden.shape[1], dh.dtype
    dhidden = torch.empty_like(hidden) if needs[0] else None
    da = torch.zeros_like(a, dtype=wide) if needs[1] else None
    up = a.to(wide) * factor
    for s in spans(hidden.shape[0], pad or ROWS):
        du = low_rank.of_u(dh[s, width:])[:, : len(a)]
        if dhidden is not None:
            dhidden[s] = _times(du, up, pad).add_(dh[s, :width])
        if da is not None:
            live = du.ne(0).any(1, keepdim=True)  # another row is not read: a NaN in it stays there
            da.addmm_(du.T, torch.where(live, hidden[s].to(wide), 0.0), alpha=factor)
    return dhidden, da


_backward_operator = register(
    "linear_logprob_lora_backward",
    schema_of(_backward, Options, 4),
    _backward,
    fake=gradients_fake,
)


lora_operator = register(
    "linear_logprob_lora",
    schema_of(_forward, Options, RESULTS),
    _forward,
    fake=_forward_fake,
    setup_context=saving(7, 3, skip=2),
    backward=gradients_through(_backward_operator, 3, inputs=4),
)

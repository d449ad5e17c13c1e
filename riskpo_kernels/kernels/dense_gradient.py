"""The gradient of a tile of logits, recomputed and rounded where it is made: the dense backward's.

    z = h W^T and so on        dz as in kernels/softmax_rows.py        written once, in 16 bits

    tensor                      shape            dtype
    hidden, weight              [R, D], [C, D]   bf16, fp16 (fp32 in the interpreter)
    target                      [R]              int64, counted from the tile's first column
    numbers of a row, T         [R]              fp32
    dz                          [R, C]           dtype of hidden; rows a multiple of 16 apart
    sums                        [R / BM, C]      fp32, of dz's columns before they are rounded

Cost: 2 R C D FLOPs and 2 bytes a logit, where a float32 tile in memory and a pass over it move 10.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from riskpo_kernels.core.gradient import RowGradient
from riskpo_kernels.core.matmul import executed
from riskpo_kernels.core.softmax import BLOCK, LogitMap
from riskpo_kernels.core.softmax import FLOOR as LOG_FLOOR
from riskpo_kernels.kernels import Configuration, multiprocessors, of_rows, readable
from riskpo_kernels.kernels.head_tile import (
    FORWARDS,
    hits_of,
    operands_of,
    product,
    tile_at,
    tile_configuration,
)
from riskpo_kernels.kernels.softmax_rows import ROW_POINTERS
from riskpo_kernels.kernels.tl_math import at_least, logits_of

FLOOR = tl.constexpr(LOG_FLOOR)


@triton.jit
def block_gradient(
    x, v, C,
    p_bias, p_dz, p_sums,
    i_r, o_r, m_r, target, hits, at_target, offset, slope, peak, log_sum, stride_dz, inner, outer,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # products x [BM, BLOCK] of the columns from v on; the others are of its rows [BM];
    # hits: how many of them have their target among these columns
    o_v = v + tl.arange(0, BLOCK)  # [BLOCK]
    m_v = o_v < C
    if p_bias is not None:
        x += tl.load(p_bias + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
    z, cap_slope = logits_of(x, inner, outer[:, None])
    log_p = at_least((z - peak[:, None]) - log_sum[:, None], FLOOR)  # 0 * -inf is NaN
    by_mass = -offset[:, None]
    if slope is not None:
        by_mass -= slope[:, None] * log_p
    dz = tl.exp(log_p) * by_mass
    if hits > 0:  # of few tiles
        dz = tl.where(o_v[None, :] == target[:, None], at_target[:, None], dz)
    if inner is not None:
        dz *= cap_slope
    at = o_r[:, None] * stride_dz + o_v[None, :]
    m_dz = m_r[:, None] & (o_v < stride_dz)[None, :]  # a multiple of 16: wide stores
    tl.store(p_dz + at, dz.to(p_dz.dtype.element_ty), mask=m_dz)
    if p_sums is not None:
        tl.store(p_sums + i_r * C + o_v, tl.sum(dz, 0), mask=m_v)


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=ROW_POINTERS)
def dense_kernel(
    d_hidden, d_weight, p_hidden, p_weight, p_bias, p_target, p_temperature, p_at_target, p_offset,
    p_slope, p_peak, p_log_sum, p_dz, p_sums,
    R, C, D, stride_h, stride_w, stride_dz, inner, outer,
    TMA: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n_r, n_v = tl.cdiv(R, BM), tl.cdiv(C, BN)
    for tile in tl.range(tl.program_id(0), n_r * n_v, tl.num_programs(0), flatten=True):
        i_r, v = tile_at(tile, n_r, n_v, GROUP, BN)
        o_r = i_r.to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
        m_r = o_r < R
        x = product(
            d_hidden, d_weight, p_hidden, p_weight, i_r, v, R, C, D, stride_h, stride_w,
            TMA, BM, BN, BK,
        )  # fmt: skip

        target = tl.load(p_target + o_r, mask=m_r, other=-1)
        target = tl.where((target >= 0) & (target < C), target, -1).to(tl.int32)
        at_target = tl.load(p_at_target + o_r, mask=m_r, other=0.0)
        offset = tl.load(p_offset + o_r, mask=m_r, other=0.0)
        slope = None
        if p_slope is not None:
            slope = tl.load(p_slope + o_r, mask=m_r, other=0.0)
        peak = tl.load(p_peak + o_r, mask=m_r, other=0.0)
        log_sum = tl.load(p_log_sum + o_r, mask=m_r, other=0.0)
        hits = hits_of(target, m_r, v, BN, BLOCK)
        by = tl.full((BM,), 1.0, tl.float32) * outer
        if p_temperature is not None:
            by = outer / tl.load(p_temperature + o_r, mask=m_r, other=1.0)
        tl.static_assert(BN == BLOCK or BN == 2 * BLOCK)
        if BN == BLOCK:
            parts = (x,)
        else:
            parts = tl.split(tl.permute(tl.reshape(x, (BM, 2, BLOCK)), (0, 2, 1)))
        for j in tl.static_range(BN // BLOCK):
            block_gradient(
                parts[j], v + j * BLOCK, C, p_bias, p_dz, p_sums, i_r, o_r, m_r, target,
                (hits >> (16 * j)) & 65535, at_target, offset, slope, peak, log_sum, stride_dz,
                inner, by, BLOCK,
            )  # fmt: skip


def tile_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    up: RowGradient,
    map: LogitMap,
    dz: torch.Tensor,
    *,
    sums: bool,
) -> torch.Tensor | None:
    """Fill dz [R, C] for hidden [R, D] and weight [C, D]; with `sums` those of its columns [C],
    float32, before they were rounded. Every row has a coefficient, or hidden states of zeros."""
    (rows, columns), device = dz.shape, dz.device
    hidden, weight = readable(hidden), readable(weight)
    tile, operands = operands_of(hidden, weight, narrow=map.softcap is not None)
    row_tiles, column_tiles = -(-rows // tile.rows), -(-columns // tile.columns)
    executed(rows, columns, hidden.shape[1])
    found = torch.empty(row_tiles, columns, dtype=torch.float32, device=device) if sums else None
    with torch.cuda.device_of(dz):
        dense_kernel[(min(row_tiles * column_tiles, multiprocessors(device)),)](
            **operands,
            p_bias=bias,
            p_target=target,
            **of_rows(map, up),
            p_dz=dz,
            p_sums=found,
            R=rows,
            C=columns,
            stride_dz=dz.stride(0),
            BLOCK=BLOCK,
        )
    return None if found is None else found.sum(0)


def compile_configurations() -> list[Configuration]:
    """What can be launched, see kernels/__init__.py: each way to make a logit in bf16, with dbias
    and the entropy's gradient; the plainest and the fullest of fp16."""
    every = list(itertools.product(*((False, True),) * 3))  # bias and dbias, softcap, temperatures
    choices = [("bf16", x, True) for x in every]
    choices += [("bf16", every[0], False), ("fp16", every[0], False), ("fp16", every[-1], True)]
    made = []
    for variant, (dtype, (bias, softcap, per_row), g) in itertools.product(FORWARDS, choices):
        flags: dict[str, Any] = {"BLOCK": BLOCK}
        types = {"p_target": "i64", "p_dz": dtype}
        given = {"p_bias": bias, "p_sums": bias, "p_temperature": per_row, "p_slope": g}
        given |= {"inner": softcap}
        title = f"bias={bias:d} softcap={softcap:d} rows={per_row:d} g={g:d}"
        shape = dtype, variant, types, given, flags
        made.append(tile_configuration("dense", title, dense_kernel, *shape, narrow=softcap))
    return made

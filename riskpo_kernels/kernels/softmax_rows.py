"""Folding a tile of logits into running softmax statistics, and turning it into its gradient.

    x = (raw + bias) * scale        z = softcap tanh(x / softcap) / T        (without: z = x / T)

fold: with t the target and, over the other columns, m = max z, s = sum e^(z-m),
u = sum e^(z-m) (z-m), one pass over the tile updates (m, s, u, z_t) of each row.

gradient: with log p = z - peak - log_sum and three numbers a row (rows.RowGradient), which
scale / T is in,

    dz_v = -p_v (offset + slope log p_v)        v != t
    dz_t = at_target
    draw = dz * softcap'(x)

    tensor                      shape    dtype
    raw                         [R, C]   fp32, bf16, fp16; any row stride, unit column stride
    target                      [R]      int64, counted from the tile's first column
    state, numbers of a row, T  [R]      fp32
    out                         [R, C]   fp32, bf16, fp16; may be raw itself

Cost per element: fold one read and one exp, gradient one read, one exp and one write. No atomics.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from riskpo_kernels.core.rows import BLOCK as COLUMNS
from riskpo_kernels.core.rows import FLOOR as LOG_FLOOR
from riskpo_kernels.core.rows import IGNORED as UNREAD
from riskpo_kernels.core.rows import LogitMap, RowGradient, RowState
from riskpo_kernels.kernels import Configuration, signature_of
from riskpo_kernels.kernels.tl_math import logits_gradient, logits_of, online_softmax

# One program holds BN rows x BV columns, 16 fp32 values a thread; rows are read in runs of 2 KB.
BN, BV, WARPS = 8, 512, 8
MAX_REGISTERS = 128  # left alone, ptxas spills a few bytes to reach the next occupancy step
IGNORED = tl.constexpr(UNREAD)
FLOOR = tl.constexpr(LOG_FLOOR)


# Pieces of rows begin anywhere: without these lists every alignment of a piece, and every other
# remainder of its length, would compile the kernels again.
PER_ROW = "target temperature m s u zt blocks at_target offset slope peak log_sum"
ROW_POINTERS = [f"p_{name}" for name in PER_ROW.split()]


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=ROW_POINTERS)
def _fold_kernel(
    p_raw,
    p_bias,
    p_target,
    p_temperature,
    p_m,
    p_s,
    p_u,
    p_zt,
    p_blocks,
    R,
    C,
    stride_raw,
    stride_blocks,
    scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)  # [BN]
    m_n = o_n < R
    target = tl.load(p_target + o_n, mask=m_n, other=-1)
    m_n = m_n & (target != IGNORED)  # an ignored row is never read

    m = tl.load(p_m + o_n, mask=m_n, other=0.0)
    s = tl.load(p_s + o_n, mask=m_n, other=0.0)
    zt = tl.load(p_zt + o_n, mask=m_n, other=0.0)
    u = tl.full((BN,), 0.0, tl.float32)
    if ENTROPY:
        u = tl.load(p_u + o_n, mask=m_n, other=0.0)
    if HAS_TEMPERATURE:
        temperature = tl.load(p_temperature + o_n, mask=m_n, other=1.0)[:, None]

    for v in range(0, C, BV):
        o_v = v + tl.arange(0, BV)  # [BV]
        m_v = o_v < C
        x = tl.load(
            p_raw + o_n[:, None] * stride_raw + o_v[None, :],
            mask=m_n[:, None] & m_v[None, :],
            other=0.0,
        ).to(tl.float32)  # [BN, BV]
        if HAS_BIAS:
            x += tl.load(p_bias + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
        z, _ = logits_of(x, scale, softcap, temperature, HAS_SOFTCAP)

        z = tl.where(m_v[None, :], z, float("-inf"))
        taken = o_v[None, :] == target[:, None]
        here = (target >= v) & (target < v + BV) & (target < C)
        m, s, u, zt, e, anchor = online_softmax(z, taken, here, m, s, u, zt, ENTROPY, FLOOR)
        if HAS_BLOCKS:
            sums = tl.sum(tl.reshape(e, (BN, BV // BLOCK, BLOCK)), 2)  # [BN, BV / BLOCK]
            o_b = v // BLOCK + tl.arange(0, BV // BLOCK)
            tl.store(
                p_blocks + o_n[:, None] * stride_blocks + o_b[None, :],
                anchor[:, None] + tl.log(sums),
                mask=m_n[:, None] & (o_b * BLOCK < C)[None, :],
            )

    tl.store(p_m + o_n, m, mask=m_n)
    tl.store(p_s + o_n, s, mask=m_n)
    tl.store(p_zt + o_n, zt, mask=m_n)
    if ENTROPY:
        tl.store(p_u + o_n, u, mask=m_n)


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=ROW_POINTERS)
def _gradient_kernel(
    p_raw,
    p_bias,
    p_target,
    p_temperature,
    p_at_target,
    p_offset,
    p_slope,
    p_peak,
    p_log_sum,
    p_out,
    R,
    C,
    stride_raw,
    stride_out,
    scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
):
    n_v = tl.cdiv(C, BV)
    i_n = (tl.program_id(0) // n_v).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)  # [BN]
    o_v = (tl.program_id(0) % n_v) * BV + tl.arange(0, BV)  # [BV]
    m_n, m_v = o_n < R, o_v < C

    target = tl.load(p_target + o_n, mask=m_n, other=-1)
    live = m_n & (target != IGNORED)
    at_target = tl.load(p_at_target + o_n, mask=live, other=0.0)
    offset = tl.load(p_offset + o_n, mask=live, other=0.0)
    slope = tl.full((BN,), 0.0, tl.float32)
    if HAS_SLOPE:
        slope = tl.load(p_slope + o_n, mask=live, other=0.0)
    # a row without a gradient is not read either
    live = live & ((at_target != 0) | (offset != 0) | (slope != 0))
    peak = tl.load(p_peak + o_n, mask=live, other=0.0)
    log_sum = tl.load(p_log_sum + o_n, mask=live, other=0.0)
    if HAS_TEMPERATURE:
        temperature = tl.load(p_temperature + o_n, mask=live, other=1.0)[:, None]
    x = tl.load(
        p_raw + o_n[:, None] * stride_raw + o_v[None, :],
        mask=live[:, None] & m_v[None, :],
        other=0.0,
    ).to(tl.float32)  # [BN, BV]
    if HAS_BIAS:
        x += tl.load(p_bias + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
    z, cap_slope = logits_of(x, scale, softcap, temperature, HAS_SOFTCAP)

    log_p = (z - peak[:, None]) - log_sum[:, None]
    taken = o_v[None, :] == target[:, None]
    dz = logits_gradient(log_p, taken, at_target, offset, slope, HAS_SLOPE, FLOOR)
    dz = tl.where(live[:, None], dz * cap_slope, 0.0)

    tl.store(
        p_out + o_n[:, None] * stride_out + o_v[None, :],
        dz.to(p_out.dtype.element_ty),
        mask=m_n[:, None] & m_v[None, :],
    )


def _row_temperature(map: LogitMap) -> tuple[torch.Tensor | None, float]:
    if isinstance(map.temperature, torch.Tensor):
        return map.temperature, 1.0
    return None, map.temperature


def fold(
    raw: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    state: RowState,
    map: LogitMap,
    blocks: torch.Tensor | None = None,
) -> None:
    """Fold a tile of raw logits [R, C] into `state`; same contract as softmax_rows.fold, but raw
    is left alone and rows whose target is IGNORED are skipped."""
    rows, cols = raw.shape
    per_row, temperature = _row_temperature(map)
    if rows == 0 or cols == 0:
        return
    with torch.cuda.device_of(raw):
        _fold_kernel[(triton.cdiv(rows, BN),)](
            p_raw=raw,
            p_bias=bias,
            p_target=target,
            p_temperature=per_row,
            p_m=state.m,
            p_s=state.s,
            p_u=state.u,
            p_zt=state.zt,
            p_blocks=blocks,
            R=rows,
            C=cols,
            stride_raw=raw.stride(0),
            stride_blocks=0 if blocks is None else blocks.stride(0),
            scale=map.scale,
            softcap=map.softcap or 1.0,
            temperature=temperature,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=map.softcap is not None,
            HAS_TEMPERATURE=per_row is not None,
            ENTROPY=state.u is not None,
            HAS_BLOCKS=blocks is not None,
            BLOCK=COLUMNS,
            BN=BN,
            BV=BV,
            num_warps=WARPS,
            maxnreg=MAX_REGISTERS,
        )


def gradient(
    raw: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    up: RowGradient,
    map: LogitMap,
    out: torch.Tensor,
) -> torch.Tensor:
    """The gradient of a tile's raw logits [R, C] into `out`; same contract as
    softmax_rows.gradient. Rows that are IGNORED or have no coefficient are written as zeros."""
    rows, cols = raw.shape
    per_row, temperature = _row_temperature(map)
    if rows == 0 or cols == 0:
        return out
    with torch.cuda.device_of(raw):
        _gradient_kernel[(triton.cdiv(rows, BN) * triton.cdiv(cols, BV),)](
            p_raw=raw,
            p_bias=bias,
            p_target=target,
            p_temperature=per_row,
            p_at_target=up.at_target,
            p_offset=up.offset,
            p_slope=up.slope,
            p_peak=up.peak,
            p_log_sum=up.log_sum,
            p_out=out,
            R=rows,
            C=cols,
            stride_raw=raw.stride(0),
            stride_out=out.stride(0),
            scale=map.scale,
            softcap=map.softcap or 1.0,
            temperature=temperature,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=map.softcap is not None,
            HAS_TEMPERATURE=per_row is not None,
            HAS_SLOPE=up.slope is not None,
            BN=BN,
            BV=BV,
            num_warps=WARPS,
            maxnreg=MAX_REGISTERS,
        )
    return out


def compile_configurations() -> list[Configuration]:
    """Everything that can be launched: see kernels/__init__.py."""
    configurations = []
    for raw, bias, softcap, per_row, entropy, blocks in itertools.product(
        ("fp32", "bf16", "fp16"), *((False, True),) * 5
    ):
        if (bias or blocks) and raw != "fp32":
            continue  # only the head's own float32 tiles have a bias, or blocks to select
        flags: dict[str, Any] = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap}
        name = f"fold {raw} bias={bias:d} softcap={softcap:d} rows={per_row:d} entropy={entropy:d} "
        name += f"blocks={blocks:d}"
        given = {"p_bias": bias, "p_temperature": per_row, "p_u": entropy, "p_blocks": blocks}
        types = {"p_raw": raw, "p_target": "i64"}
        flags |= {"HAS_TEMPERATURE": per_row, "ENTROPY": entropy}
        flags |= {"HAS_BLOCKS": blocks, "BLOCK": COLUMNS}
        configurations.append(_configuration(name, _fold_kernel, types, given, flags))
    for (raw, out), bias, softcap, per_row, g in itertools.product(
        (("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "bf16"), ("fp16", "fp16")),
        *((False, True),) * 4,
    ):
        if bias and raw != "fp32":
            continue
        flags = {
            "HAS_BIAS": bias,
            "HAS_SOFTCAP": softcap,
            "HAS_TEMPERATURE": per_row,
            "HAS_SLOPE": g,
        }
        name = f"gradient {raw}->{out} bias={bias:d} softcap={softcap:d} rows={per_row:d} g={g:d}"
        given = {"p_bias": bias, "p_temperature": per_row, "p_slope": g}
        types = {"p_raw": raw, "p_out": out, "p_target": "i64"}
        configurations.append(_configuration(name, _gradient_kernel, types, given, flags))
    return configurations


def _configuration(
    name: str, kernel: Any, types: dict[str, str], given: dict[str, bool], flags: dict[str, Any]
) -> Configuration:
    signature, constexprs = signature_of(kernel, types, given, flags | {"BN": BN, "BV": BV})
    launch = (WARPS, 3, {"maxnreg": MAX_REGISTERS})
    return Configuration(name, kernel, signature, constexprs, *launch)

"""Softmax statistics of rows of logits, and the gradient of a tile of logits.

    x = (raw + bias) * scale        z = softcap tanh(x / softcap) / T        (without: z = x / T)

statistics: with t the target and, over the other columns, m = max z, s = sum e^(z-m),
u = sum e^(z-m) (z-m), one warp folds a row in base 2 and finishes it (core/softmax.py).

gradient: with log p = z - peak - log_sum and three numbers a row (core/gradient.py), which
scale / T is in,

    dz_v = -p_v (offset + slope log p_v)        v != t
    dz_t = at_target
    draw = dz * softcap'(x)

    tensor                      shape    dtype
    raw                         [R, C]   fp32, bf16, fp16; any row stride, unit column stride
    target                      [R]      int64, counted from the tile's first column
    results, numbers of a row, T [R]     fp32
    out                         [R, C]   fp32, bf16, fp16; may be raw itself

Cost per element: one read and one exp, and of the gradient one write. No atomics.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from riskpo_kernels.core.gradient import RowGradient
from riskpo_kernels.core.softmax import FLOOR as LOG_FLOOR
from riskpo_kernels.core.softmax import IGNORED as UNREAD
from riskpo_kernels.core.softmax import LogitMap
from riskpo_kernels.kernels import Configuration, at_most, configuration, of_rows
from riskpo_kernels.kernels.tl_math import (
    LN2,
    LOG2E,
    LOWEST,
    at_least,
    logits_gradient,
    logits_of,
    row_results,
    tanh,
)

# One program holds BN rows x BV columns, 16 fp32 values a thread; rows are read in runs of 2 KB.
BN, BV, WARPS = 8, 512, 8
ROW_RUN = 1024  # columns that a row's only warp folds at once: nothing waits at a barrier
MAX_REGISTERS = 128  # left alone, ptxas spills a few bytes to reach the next occupancy step
IGNORED = tl.constexpr(UNREAD)
FLOOR = tl.constexpr(LOG_FLOOR)


# Pieces of rows begin anywhere: without these lists every alignment of a piece, and every other
# remainder of its length, would compile the kernels again.
PER_ROW = "target temperature logprob entropy total at_target offset slope peak log_sum"
ROW_POINTERS = [f"p_{name}" for name in PER_ROW.split()]


@triton.jit(do_not_specialize_on_alignment=ROW_POINTERS)
def _rows_kernel(
    p_raw, p_target, p_temperature, p_logprob, p_entropy, p_total, p_peak, p_log_sum,
    V, stride_raw, inner, outer,
    BV: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    target = tl.load(p_target + r)
    live = target != IGNORED  # an ignored row is never read
    here = live & (target >= 0) & (target < V)
    if p_temperature is not None:
        outer = outer / tl.load(p_temperature + r)
    k = outer * LOG2E
    p_row = p_raw + r * stride_raw
    x_t = tl.load(p_row + target, mask=here, other=0.0).to(tl.float32)
    if inner is not None:
        x_t = tanh(x_t * inner)
    x_t = tl.where(here, x_t, float("-inf"))
    column = tl.where(here, target, -1).to(tl.int32)
    m, s, u = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32), 0.0
    for v in range(0, V, BV):
        o_v = v + tl.arange(0, BV)  # [BV]
        m_v = o_v < V
        m_x = tl.where(live, o_v, V) < V  # a tensor: see block_statistics
        x = tl.load(p_row + o_v, mask=m_x, other=float("-inf")).to(tl.float32)
        if inner is not None:
            x = tanh(x * inner)
        x = tl.where(m_v & (o_v != column), x, float("-inf"))
        new = tl.maximum(m, tl.max(x, 0))
        y = (x - new) * k  # in base 2; the difference is exact near the largest
        e = tl.exp2(y)
        shift = tl.maximum((m - new) * k, FLOOR)  # exp2(FLOOR) = 0, and 0 * FLOOR is not NaN
        keep = tl.exp2(shift)
        if p_entropy is not None:
            u = keep * (u + s * shift) + tl.sum(e * at_least(y, FLOOR), 0)
        s = s * keep + tl.sum(e, 0)
        m = new
    none = m == LOWEST
    d, z_t = (m - x_t) * outer, x_t * outer
    m = tl.where(none, float("-inf"), m * outer)
    logprob, entropy, peak, log_sum, _ = row_results(m, d, s, u * LN2, z_t)
    tl.store(p_logprob + r, tl.where(live, logprob, 0.0))
    tl.store(p_total + r, tl.where(live, peak + log_sum, 0.0))
    tl.store(p_peak + r, tl.where(live, peak, 0.0))
    tl.store(p_log_sum + r, tl.where(live, log_sum, 0.0))
    if p_entropy is not None:
        tl.store(p_entropy + r, tl.where(live, entropy, 0.0))


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=ROW_POINTERS)
def _gradient_kernel(
    p_raw, p_bias, p_target, p_temperature, p_at_target, p_offset, p_slope, p_peak, p_log_sum,
    p_out,
    R, C, stride_raw, stride_out, inner, outer,
    BN: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    n_v = tl.cdiv(C, BV)
    i_n = (tl.program_id(0) // n_v).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)  # [BN]
    o_v = (tl.program_id(0) % n_v) * BV + tl.arange(0, BV)  # [BV]
    m_n, m_v = o_n < R, o_v < C

    target = tl.load(p_target + o_n, mask=m_n, other=-1)
    live = m_n & (target != IGNORED)
    at_target = tl.load(p_at_target + o_n, mask=live, other=0.0)
    offset = tl.load(p_offset + o_n, mask=live, other=0.0)
    sent, slope = (at_target != 0) | (offset != 0), None
    if p_slope is not None:
        slope = tl.load(p_slope + o_n, mask=live, other=0.0)
        sent = sent | (slope != 0)
    live = live & sent  # a row without a gradient is not read either
    peak = tl.load(p_peak + o_n, mask=live, other=0.0)
    log_sum = tl.load(p_log_sum + o_n, mask=live, other=0.0)
    if p_temperature is not None:
        outer = outer / tl.load(p_temperature + o_n, mask=live, other=1.0)[:, None]
    x = tl.load(
        p_raw + o_n[:, None] * stride_raw + o_v[None, :],
        mask=live[:, None] & m_v[None, :],
        other=0.0,
    ).to(tl.float32)  # [BN, BV]
    if p_bias is not None:
        x += tl.load(p_bias + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
    z, cap_slope = logits_of(x, inner, outer)

    log_p = (z - peak[:, None]) - log_sum[:, None]
    taken = o_v[None, :] == target[:, None]
    dz = logits_gradient(log_p, taken, at_target, offset, slope, FLOOR)
    dz = tl.where(live[:, None], dz * cap_slope, 0.0)

    tl.store(
        p_out + o_n[:, None] * stride_out + o_v[None, :],
        dz.to(p_out.dtype.element_ty),
        mask=m_n[:, None] & m_v[None, :],
    )


def row_statistics(
    raw: torch.Tensor, target: torch.Tensor, map: LogitMap, results: list[torch.Tensor | None]
) -> None:
    """logprob, entropy (or None), lse, peak and log_sum [R] of whole rows of logits [R, V], into
    `results`: core/softmax.py's statistics and finish. Rows whose target is IGNORED get 0."""
    rows, vocab = raw.shape
    if rows == 0:
        return
    logprob, entropy, total, peak, log_sum = results
    with torch.cuda.device_of(raw):
        _rows_kernel[(rows,)](
            p_raw=raw,
            p_target=target,
            p_logprob=logprob,
            p_entropy=entropy,
            p_total=total,
            p_peak=peak,
            p_log_sum=log_sum,
            V=vocab,
            stride_raw=raw.stride(0),
            **of_rows(map),
            BV=ROW_RUN,
            num_warps=1,
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
    if rows == 0 or cols == 0:
        return out
    with torch.cuda.device_of(raw):
        _gradient_kernel[(-(-rows // BN) * -(-cols // BV),)](
            p_raw=raw,
            p_bias=bias,
            p_target=target,
            **of_rows(map, up),
            p_out=out,
            R=rows,
            C=cols,
            stride_raw=raw.stride(0),
            stride_out=out.stride(0),
            BN=BN,
            BV=BV,
            num_warps=WARPS,
            **at_most(MAX_REGISTERS),
        )
    return out


def compile_configurations() -> list[Configuration]:
    """What can be launched, see kernels/__init__.py: each way to make a logit with one pair of
    dtypes; the plainest and the fullest with the others."""
    made = []
    for raw, softcap, per_row, entropy in itertools.product(
        ("fp32", "bf16", "fp16"), *((False, True),) * 3
    ):
        if raw != "bf16" and not softcap == per_row == entropy:
            continue
        name = f"rows {raw} softcap={softcap:d} rows={per_row:d} entropy={entropy:d}"
        given = {"p_temperature": per_row, "p_entropy": entropy, "inner": softcap}
        types = {"p_raw": raw, "p_target": "i64"}
        made.append(configuration(name, _rows_kernel, types, given, {"BV": ROW_RUN}, 1))
    for (raw, out), bias, softcap, per_row, g in itertools.product(
        (("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "bf16"), ("fp16", "fp16")),
        *((False, True),) * 4,
    ):
        if bias and raw != "fp32":
            continue
        fullest = bias == (raw == "fp32") and softcap and per_row and g
        if out != "bf16" and not (fullest or not (bias or softcap or per_row or g)):
            continue
        name = f"gradient {raw}->{out} bias={bias:d} softcap={softcap:d} rows={per_row:d} g={g:d}"
        given = {"p_bias": bias, "p_temperature": per_row, "p_slope": g, "inner": softcap}
        types = {"p_raw": raw, "p_out": out, "p_target": "i64"}
        flags = {"BN": BN, "BV": BV}
        launch = configuration(name, _gradient_kernel, types, given, flags, WARPS)
        made.append(launch._replace(options={"maxnreg": MAX_REGISTERS}))
    return made

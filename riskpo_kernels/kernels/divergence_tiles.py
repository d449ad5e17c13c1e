"""Tiles of a student's logits p and a teacher's q: what a divergence needs of them, in one read.

    x = (raw + bias) * scale        z = softcap tanh(x / softcap) / T        (without: z = x / T)

statistics: with a the side that weighs (q in forward_kl, p in reverse_kl) and b the other one, per
row and block of 128 columns, y = z - top,

    top = max z   s = sum e^y   of either side
    u = sum e^y_a (y_a - y_b)   far = sum e^y_a |y_a - y_b|

The row's peaks are not in them: programs may run in any order, and a common offset of a side's
logits loses nothing. lm_head/divergence_stats.py makes of them what a row needs.

mixture (jsd, given the row's peaks and log-sums): with log m = log(beta q + (1 - beta) p), sums of
q (log q - log m), p (log p - log m), p |log p - log m| and p.

gradient: of a tile's raw student logits, a factor of the row and the softcap's slope times

    forward_kl   p - q
    reverse_kl   p (log p - log q - own)                   own = KL(p || q)
    jsd          (1 - beta) p (log p - log m - own)        own = KL(p || m)

    tensor                          shape        dtype
    raw                             [R, C]       fp32, contiguous
    bias, temperature               [C], [R]     fp32
    statistics, mixture             [k, B, R]    fp32; blocks first, first + 1, ... of B are written
    numbers (peaks, log-sums, ...)  [6, R]       fp32, contiguous
    dz                              [R, C]       fp32 (may be p's raw), bf16, fp16; contiguous
    sums                            [R / 16, C]  fp32, column sums of each program's rows of dz

Cost per pair of logits: 8 bytes read, two exp (jsd three), and of the gradient one write. No
atomics. A logit of -inf is a word without probability: it weighs nothing, and the divergence is
infinite where the side that weighs has some.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import triton
import triton.language as tl

from riskpo_kernels.core.softmax import BLOCK, RawTile
from riskpo_kernels.kernels import Configuration, at_most, configuration
from riskpo_kernels.kernels.tl_math import LOWEST, at_least, log1p, logits_of

KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
ROWS, WARPS = 16, 4  # a program has 16 rows of one block: 16 values of either side a thread
MAX_REGISTERS = 168  # left alone, ptxas spills a few bytes of a gradient to reach an occupancy step


@triton.jit
def _places(R, C, BR: tl.constexpr, BLOCK: tl.constexpr):
    # rows and block of a program
    n_v = tl.cdiv(C, BLOCK)
    i_r, i_v = tl.program_id(0) // n_v, tl.program_id(0) % n_v
    o_r = i_r.to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    return i_r, i_v, o_r, i_v * BLOCK + tl.arange(0, BLOCK), o_r < R


@triton.jit
def _side(p_raw, p_bias, p_temperature, o_r, o_v, m_r, C, inner, outer):
    # z [BR, BLOCK] of one side, -inf beyond the last column, and the softcap's slope
    m_v = o_v < C
    at = o_r[:, None] * C + o_v[None, :]
    x = tl.load(p_raw + at, mask=m_r[:, None] & m_v[None, :], other=0.0)
    if p_bias is not None:
        x += tl.load(p_bias + o_v, mask=m_v, other=0.0)[None, :]
    if p_temperature is not None:
        outer = outer / tl.load(p_temperature + o_r, mask=m_r, other=1.0)[:, None]
    z, slope = logits_of(x, inner, outer)
    return tl.where(m_v[None, :], z, float("-inf")), slope


@triton.jit
def _logits(
    p_p, p_q, p_p_bias, p_q_bias, p_temperature, o_r, o_v, m_r, C, inner, outer, q_inner, q_outer
):  # fmt: skip
    # of both sides, and the student's slope
    z_p, slope = _side(p_p, p_p_bias, p_temperature, o_r, o_v, m_r, C, inner, outer)
    z_q, _ = _side(p_q, p_q_bias, p_temperature, o_r, o_v, m_r, C, q_inner, q_outer)
    return z_p, z_q, slope


@triton.jit
def _log_probs(z, p_numbers, o_r, m_r, R, FIRST: tl.constexpr):
    # of one side, whose peak and log-sum are rows FIRST and FIRST + 1 of the numbers
    peak = tl.load(p_numbers + FIRST * R + o_r, mask=m_r, other=0.0)
    log_sum = tl.load(p_numbers + (FIRST + 1) * R + o_r, mask=m_r, other=0.0)
    return (z - peak[:, None]) - log_sum[:, None]


@triton.jit
def _weighed(p, x):
    # p x, where a word without probability weighs nothing, whatever x; a NaN of p stays one
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def _log_mixture(log_p, log_q, log_beta, log_rest):
    # log(beta q + (1 - beta) p)
    a, b = log_q + log_beta, log_p + log_rest
    high = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    gap = tl.where(high == float("-inf"), 0.0, tl.abs(a - b))  # -inf - -inf is NaN
    return high + log1p(tl.exp(-gap))


@triton.jit(
    do_not_specialize=["R", "first", "n_blocks"], do_not_specialize_on_alignment=["p_temperature"]
)
def divergence_statistics_kernel(
    p_p, p_q, p_p_bias, p_q_bias, p_temperature, p_out, R, C, first, n_blocks,
    inner, outer, q_inner, q_outer,
    KIND: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, i_v, o_r, o_v, m_r = _places(R, C, BR, BLOCK)
    z_p, z_q, _ = _logits(
        p_p, p_q, p_p_bias, p_q_bias, p_temperature, o_r, o_v, m_r, C,
        inner, outer, q_inner, q_outer,
    )  # fmt: skip
    top_p, top_q = at_least(tl.max(z_p, 1), LOWEST), at_least(tl.max(z_q, 1), LOWEST)
    y_p, y_q = z_p - top_p[:, None], z_q - top_q[:, None]
    e_p, e_q = tl.exp(y_p), tl.exp(y_q)
    stride = n_blocks.to(tl.int64) * R
    at = p_out + (first + i_v).to(tl.int64) * R + o_r
    tl.store(at, top_p, mask=m_r)
    tl.store(at + stride, top_q, mask=m_r)
    tl.store(at + 2 * stride, tl.sum(e_p, 1), mask=m_r)
    tl.store(at + 3 * stride, tl.sum(e_q, 1), mask=m_r)
    if KIND == 0:
        tl.store(at + 4 * stride, tl.sum(_weighed(e_q, y_q - y_p), 1), mask=m_r)
    if KIND == 1:
        d = _weighed(e_p, y_p - y_q)
        tl.store(at + 4 * stride, tl.sum(d, 1), mask=m_r)
        tl.store(at + 5 * stride, tl.sum(tl.abs(d), 1), mask=m_r)


@triton.jit(
    do_not_specialize=["R", "first", "n_blocks"], do_not_specialize_on_alignment=["p_temperature"]
)
def divergence_mixture_kernel(
    p_p, p_q, p_p_bias, p_q_bias, p_temperature, p_numbers, p_out, R, C, first, n_blocks,
    inner, outer, q_inner, q_outer, log_beta, log_rest,
    BR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, i_v, o_r, o_v, m_r = _places(R, C, BR, BLOCK)
    z_p, z_q, _ = _logits(
        p_p, p_q, p_p_bias, p_q_bias, p_temperature, o_r, o_v, m_r, C,
        inner, outer, q_inner, q_outer,
    )  # fmt: skip
    log_p = _log_probs(z_p, p_numbers, o_r, m_r, R, 0)
    log_q = _log_probs(z_q, p_numbers, o_r, m_r, R, 2)
    log_m = _log_mixture(log_p, log_q, log_beta, log_rest)
    p = tl.exp(log_p)
    own = _weighed(p, log_p - log_m)
    stride = n_blocks.to(tl.int64) * R
    at = p_out + (first + i_v).to(tl.int64) * R + o_r
    tl.store(at, tl.sum(_weighed(tl.exp(log_q), log_q - log_m), 1), mask=m_r)
    tl.store(at + stride, tl.sum(own, 1), mask=m_r)
    tl.store(at + 2 * stride, tl.sum(tl.abs(own), 1), mask=m_r)
    tl.store(at + 3 * stride, tl.sum(p, 1), mask=m_r)


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["p_temperature"])
def divergence_gradient_kernel(
    p_p, p_q, p_p_bias, p_q_bias, p_temperature, p_numbers, p_dz, p_sums, R, C,
    inner, outer, q_inner, q_outer, log_beta, log_rest, rest,
    KIND: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_r, _, o_r, o_v, m_r = _places(R, C, BR, BLOCK)
    z_p, z_q, slope = _logits(
        p_p, p_q, p_p_bias, p_q_bias, p_temperature, o_r, o_v, m_r, C,
        inner, outer, q_inner, q_outer,
    )  # fmt: skip
    log_p = _log_probs(z_p, p_numbers, o_r, m_r, R, 0)
    log_q = _log_probs(z_q, p_numbers, o_r, m_r, R, 2)
    own = tl.load(p_numbers + 4 * R + o_r, mask=m_r, other=0.0)[:, None]
    factor = tl.load(p_numbers + 5 * R + o_r, mask=m_r, other=0.0)
    p = tl.exp(log_p)
    if KIND == 0:
        dz = p - tl.exp(log_q)
    if KIND == 1:
        dz = _weighed(p, (log_p - log_q) - own)
    if KIND == 2:
        log_m = _log_mixture(log_p, log_q, log_beta, log_rest)
        dz = _weighed(p, (log_p - log_m) - own) * rest
    dz = tl.where(m_r[:, None], dz * factor[:, None] * slope, 0.0)
    m_v = o_v < C
    if p_sums is not None:
        tl.store(p_sums + i_r.to(tl.int64) * C + o_v, tl.sum(dz, 0), mask=m_v)
    at = p_dz + o_r[:, None] * C + o_v[None, :]
    tl.store(at, dz.to(p_dz.dtype.element_ty), mask=m_r[:, None] & m_v[None, :])


def statistics(kind: str, p: RawTile, q: RawTile, out: torch.Tensor, first: int) -> None:
    """top of p and of q, s of both, u and far of the tile's blocks into out [k, B, R] from block
    `first` on: k = 4 of jsd, 5 of forward_kl (no far), 6 of reverse_kl."""
    with torch.cuda.device_of(out):
        divergence_statistics_kernel[_grid(p)](
            **_operands(p, q),
            p_out=out,
            first=first,
            n_blocks=out.shape[1],
            KIND=KINDS[kind],
            num_warps=WARPS,
        )


def mixture(
    beta: float, p: RawTile, q: RawTile, numbers: torch.Tensor, out: torch.Tensor, first: int
) -> None:
    """The four sums of the tile's blocks into out [4, B, R] from block `first` on. numbers [4, R]:
    peak and log-sum of p and of q."""
    with torch.cuda.device_of(out):
        divergence_mixture_kernel[_grid(p)](
            **_operands(p, q),
            p_numbers=numbers,
            p_out=out,
            first=first,
            n_blocks=out.shape[1],
            log_beta=math.log(beta),
            log_rest=math.log1p(-beta),
            num_warps=WARPS,
        )


def gradient(
    kind: str,
    beta: float,
    p: RawTile,
    q: RawTile,
    numbers: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor | None,
) -> None:
    """The gradient of the raw student's logits into out [R, C], which may be p.raw. numbers [6, R]:
    peak and log-sum of p and of q, own, factor. sums [ceil(R / ROWS), C], whose sum is dbias."""
    shares = (math.log(beta), math.log1p(-beta), 1 - beta) if kind == "jsd" else (0.0, 0.0, 1.0)
    with torch.cuda.device_of(out):
        divergence_gradient_kernel[_grid(p)](
            **_operands(p, q),
            p_numbers=numbers,
            p_dz=out,
            p_sums=sums,
            **dict(zip(("log_beta", "log_rest", "rest"), shares, strict=True)),
            KIND=KINDS[kind],
            num_warps=WARPS,
            **at_most(MAX_REGISTERS),
        )


def _grid(p: RawTile) -> tuple[int]:
    rows, cols = p.raw.shape
    return (triton.cdiv(rows, ROWS) * triton.cdiv(cols, BLOCK),)


def _operands(p: RawTile, q: RawTile) -> dict[str, Any]:
    """What all launches say of both sides; they have the same temperature."""
    rows, cols = p.raw.shape
    (inner, outer, per_row), (q_inner, q_outer, _) = p.map.factors(), q.map.factors()
    found: dict[str, Any] = dict(p_p=p.raw, p_q=q.raw, p_p_bias=p.bias, p_q_bias=q.bias)
    found |= dict(inner=inner, outer=outer, q_inner=q_inner, q_outer=q_outer)
    return found | dict(p_temperature=per_row, R=rows, C=cols, BR=ROWS, BLOCK=BLOCK)


def compile_configurations() -> list[Configuration]:
    """What can be launched, see kernels/__init__.py: plain heads, and those with everything."""
    jobs = [("statistics", divergence_statistics_kernel, kind, "fp32") for kind in KINDS]
    jobs += [("mixture", divergence_mixture_kernel, "jsd", "fp32")]
    outs = ("fp32", "bf16", "fp16")
    jobs += [("gradient", divergence_gradient_kernel, *x) for x in itertools.product(KINDS, outs)]
    made = []
    for (what, kernel, kind, out), most in itertools.product(jobs, (False, True)):
        flags: dict[str, Any] = {"BR": ROWS, "BLOCK": BLOCK}
        flags |= {"KIND": KINDS[kind]} if what != "mixture" else {}
        optional = ("p_p_bias", "p_q_bias", "p_temperature", "p_sums", "inner", "q_inner")
        given = dict.fromkeys(optional, most)
        name = f"divergence-{what}->{out} {kind} most={most:d}"
        options = {"maxnreg": MAX_REGISTERS} if what == "gradient" else {}
        made.append(configuration(name, kernel, {"p_dz": out}, given, flags, WARPS, **options))
    return made

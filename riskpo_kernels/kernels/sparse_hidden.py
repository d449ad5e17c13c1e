"""dH over the active (row, block) pairs: the second product of kernels/sparse_blocks.py.

    dH[r] += dz W_b              for every pair (r, b): a row has pairs in several blocks

Either by fp32 atomics, whose order is not the same twice; or each pair's product is kept, for some
columns, and gather_kernel adds those of a row in the order of its blocks.

    tensor       shape     dtype
    parts        [P, S]    fp32, products of the pairs in S columns
    order        [P]       int64, pairs row by row, those of a row in the order of its blocks
    first_pair   [n + 1]   int64, where the pairs of each row begin in `order`
    dH           [n, D]    fp32
"""

from __future__ import annotations

import itertools

import triton
import triton.language as tl

from riskpo_kernels.kernels import Configuration
from riskpo_kernels.kernels.sparse_blocks import BM, register_limit, sparse_configuration

BD, GATHER_WARPS = 128, 1  # columns per program; a program of gather_kernel has one row


@triton.jit(do_not_specialize=["first_block", "n_blocks"])
def dh_kernel(
    p_weight, p_rows, p_starts, p_tiles, p_tile_block, p_dz, p_dh,
    D, V, first_block, n_blocks, stride_w, stride_dh,
    ATOMIC: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # p_dh is dH [n, D]; with ATOMIC off parts [P, S], of the D <= S columns that p_weight begins
    # with, and stride_dh = S
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    i_b = tl.load(p_tile_block + i_t)
    if i_b >= n_blocks:
        return
    o_p = tl.load(p_starts + i_b) + (i_t - tl.load(p_tiles + i_b)) * BM + tl.arange(0, BM)
    m_p = o_p < tl.load(p_starts + i_b + 1)
    o_v = (first_block + i_b) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < D

    o_dz = (i_t * BM + tl.arange(0, BM))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    dz = tl.load(p_dz + o_dz)  # [BM, BLOCK]
    w = tl.load(
        p_weight + o_v[:, None] * stride_w + o_d[None, :],
        mask=(o_v < V)[:, None] & m_d[None, :],
        other=0.0,
    )  # [BLOCK, BD]

    dh = tl.dot(dz, w, input_precision="ieee")  # [BM, BD]

    m_out = m_p[:, None] & m_d[None, :]
    if ATOMIC:
        r = tl.load(p_rows + o_p, mask=m_p, other=0).to(tl.int64)  # [BM]
        p_out = p_dh + r[:, None] * stride_dh + o_d[None, :]
        tl.atomic_add(p_out, dh, mask=m_out, sem="relaxed")
    else:
        tl.store(p_dh + o_p[:, None] * stride_dh + o_d[None, :], dh, mask=m_out)


@triton.jit
def gather_kernel(
    p_parts, p_order, p_first_pair, p_dh,
    D, stride_parts, stride_dh,
    BD: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    m_d = o_d < D
    first, last = tl.load(p_first_pair + i_r), tl.load(p_first_pair + i_r + 1)

    p_out = p_dh + i_r * stride_dh + o_d
    dh = tl.load(p_out, mask=m_d, other=0.0)
    for i in range(first, last):
        dh += tl.load(p_parts + tl.load(p_order + i) * stride_parts + o_d, mask=m_d, other=0.0)
    tl.store(p_out, dh, mask=m_d)


def compile_configurations() -> list[Configuration]:
    """Everything that can be launched: see kernels/__init__.py."""
    gather = sparse_configuration("gather", gather_kernel, "fp32", {}, {}, {"BD": BD})
    configurations = [gather._replace(warps=GATHER_WARPS)]
    for dtype, rows, atomic in itertools.product(("bf16", "fp16"), (BM, BM // 2), (True, False)):
        name = f"dh-dot {dtype} BM={rows} atomic={atomic:d}"
        flags = {"BD": BD, "BM": rows, "ATOMIC": atomic}
        limit = register_limit(rows)
        configurations.append(sparse_configuration(name, dh_kernel, dtype, {}, {}, flags, limit))
    return configurations

"""dW and dbias over the active (row, block) pairs: the third product of kernels/sparse_blocks.py.

    dW_b = sum dz^T H[r] over the tiles of block b     [128, D], fp32 sums, no atomics
    db_b = sum of the tiles' column sums               [128]

A job is up to `most` tiles of one block; a program takes BD columns of a job. A few blocks hold
many more pairs than the others, and their programs would go on alone when the rest is done. So they
are several jobs, whose sums fold_kernel adds in order: dW is the same twice. How many jobs there
are only the device knows: programs beyond the last one have nothing to do.

    tensor       shape            dtype
    job_block    [J]              int64, block of each job; B beyond the last job
    first_job    [B + 1]          int64, where the jobs of each block begin
    first_part   [B + 1]          int64, where the parts of each divided block do; others have none
    parts        [P, 128, D]      fp32 sums of the divided blocks' jobs; part_sums [P, 128] of dbias
"""

from __future__ import annotations

import itertools

import triton
import triton.language as tl

from riskpo_kernels.kernels import Configuration
from riskpo_kernels.kernels.sparse_blocks import BM, sparse_configuration

BD = 64  # columns of dW per program: 128 spill on sm_80
REGISTERS = 168  # left alone, ptxas squeezes sm_100's into 64 and spills


@triton.jit
def put(
    dw, db,
    p_dw, p_db, p_unit,
    i_d, o_v, o_d, D, V, stride_dw,
    ADD: tl.constexpr,
):  # fmt: skip
    # complete sums [BLOCK, BD] of a block into dW; those of dbias by the first columns' program
    m_d, m_v = o_d < D, o_v < V
    p_out = p_dw + o_v[:, None] * stride_dw + o_d[None, :]
    m_out = m_v[:, None] & m_d[None, :]
    if ADD:
        dw += tl.load(p_out, mask=m_out, other=0.0)
    if p_unit is not None:
        dw *= tl.load(p_unit)
    tl.store(p_out, dw.to(p_dw.dtype.element_ty), mask=m_out)
    if p_db is not None:
        m_db = m_v & (i_d + tl.zeros_like(o_v) == 0)  # a tensor: see block_statistics
        tl.store(p_db + o_v, db + tl.load(p_db + o_v, mask=m_db, other=0.0), mask=m_db)


@triton.jit(do_not_specialize=["first_block", "n_blocks", "most"])
def dw_kernel(
    p_hidden, p_index, p_rows, p_starts, p_tiles, p_dz, p_sums, p_job_block, p_first_job,
    p_first_part, p_parts, p_part_sums, p_dw, p_db, p_unit,
    D, V, first_block, n_blocks, most, stride_h, stride_dw,
    ADD: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_j = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1)
    i_b = tl.load(p_job_block + i_j)
    if i_b >= n_blocks:
        return
    i_p = i_j - tl.load(p_first_job + i_b)  # which of the block's jobs
    first_part, last_part = tl.load(p_first_part + i_b), tl.load(p_first_part + i_b + 1)
    skipped = i_p * most
    o_d, o_b = i_d * BD + tl.arange(0, BD), tl.arange(0, BLOCK)  # [BD], [BLOCK]
    o_v = (first_block + i_b) * BLOCK + o_b
    m_d, m_v = o_d < D, o_v < V
    start = tl.load(p_starts + i_b) + skipped * BM
    n = tl.minimum(tl.load(p_starts + i_b + 1) - start, most * BM)
    end, tile = start + n, tl.load(p_tiles + i_b) + skipped

    dw = tl.full((BLOCK, BD), 0.0, tl.float32)
    db = tl.full((BLOCK,), 0.0, tl.float32)
    for i in range(0, n, BM):
        o_p = start + i + tl.arange(0, BM)
        m_p = o_p < end
        r = tl.load(p_rows + o_p, mask=m_p, other=0).to(tl.int64)
        r = tl.load(p_index + r, mask=m_p, other=0)
        o_dz = ((tile + i // BM) * BM + tl.arange(0, BM))[:, None] * BLOCK
        dz = tl.load(p_dz + o_dz + tl.arange(0, BLOCK)[None, :])  # [BM, BLOCK]
        h = tl.load(
            p_hidden + r[:, None] * stride_h + o_d[None, :],
            mask=m_p[:, None] & m_d[None, :],
            other=0.0,
        )  # [BM, BD]
        dw = tl.dot(tl.trans(dz), h, dw, input_precision="ieee")
        if p_db is not None:
            db += tl.load(p_sums + (tile + i // BM) * BLOCK + tl.arange(0, BLOCK))

    if last_part > first_part:
        o_part = (first_part + i_p) * BLOCK + o_b
        tl.store(p_parts + o_part[:, None] * D + o_d[None, :], dw, mask=m_d[None, :])
        if p_db is not None:
            tl.store(p_part_sums + o_part, db, mask=m_v & (i_d + tl.zeros_like(o_v) == 0))
    else:
        put(dw, db, p_dw, p_db, p_unit, i_d, o_v, o_d, D, V, stride_dw, ADD)


@triton.jit(do_not_specialize=["first_block"])
def fold_kernel(
    p_parts, p_part_sums, p_first_part, p_dw, p_db, p_unit,
    D, V, first_block, stride_dw,
    ADD: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1)
    first, last = tl.load(p_first_part + i_b), tl.load(p_first_part + i_b + 1)
    if first == last:
        return
    o_d = i_d * BD + tl.arange(0, BD)  # [BD]
    o_b = tl.arange(0, BLOCK)
    o_v = (first_block + i_b) * BLOCK + o_b  # [BLOCK]
    m_d = o_d < D

    dw = tl.full((BLOCK, BD), 0.0, tl.float32)
    db = tl.full((BLOCK,), 0.0, tl.float32)
    for i in range(first, last):
        p_part = p_parts + (i * BLOCK + o_b)[:, None] * D + o_d[None, :]
        dw += tl.load(p_part, mask=m_d[None, :], other=0.0)
        if p_db is not None:
            db += tl.load(p_part_sums + i * BLOCK + o_b)

    put(dw, db, p_dw, p_db, p_unit, i_d, o_v, o_d, D, V, stride_dw, ADD)


def compile_configurations() -> list[Configuration]:
    """Everything that can be launched: see kernels/__init__.py."""
    configurations = []
    # into fp32 sums; into the gradient itself; likewise, with fp16's common unit
    ways = [("fp32", True, False), ("bf16", False, False)]
    ways += [("fp16", False, False), ("fp16", False, True)]
    no_sizes: dict[str, int] = {}
    alone = {"D": 1, "stride_dw": 1}  # dbias of a frozen head: the JIT makes constants of ones
    choices = [(db, way, no_sizes) for db, way in itertools.product((False, True), ways)]
    choices.append((True, ways[0], alone))
    for db, (out, add, unit), sizes in choices:
        given = {"p_db": db, "p_sums": db, "p_part_sums": db, "p_unit": unit}
        flags = {"ADD": add, "BD": BD} | sizes
        title = f"->{out} db={db:d} unit={unit:d} add={add:d}{' D=1' if sizes else ''}"
        name = f"fold{title}"
        types = {"p_dw": out}
        configurations.append(sparse_configuration(name, fold_kernel, "fp32", types, given, flags))
        for dtype, rows in itertools.product(("bf16", "fp16"), (BM, BM // 2)):
            if out in (dtype, "fp32"):
                name = f"dw-dot {dtype}{title} BM={rows}"
                now = flags | {"BM": rows}
                configurations.append(
                    sparse_configuration(name, dw_kernel, dtype, types, given, now, REGISTERS)
                )
    return configurations

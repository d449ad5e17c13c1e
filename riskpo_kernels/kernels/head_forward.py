"""The forward of a head: one persistent product, whose only results are statistics of blocks.

    z = softcap(scale * (h W^T + b)) / T

Per row and block of 128 columns, the target's column left out:

    top = max z        rest = log sum e^(z - top)        gap = top + rest - sum p z,  p = softmax z

top and rest apart: their sum would be rounded where all logits share a large offset.

    tensor            shape            dtype
    hidden, weight    [R, D], [V, D]   bf16, fp16 (fp32 in the interpreter: it would spill)
    target            [N]              integers; those outside offset .. offset + V: no column
    order             [N]              int64: row r has target and temperature order[first + r]
    top, rest, gap    [R, B]           fp32; gap (the block's entropy) where wanted
    z_t               [R]              fp32, written where the target is one of these columns

kernels/finish_rows.py makes of them what a row needs. A row carries nothing from tile to tile, so
the sums of a block never depend on the rows beside it, nor on the order of the programs.

Cost: 2 R V D FLOPs; beside hidden and weight it writes 8 or 12 bytes per row and block. How tiles
are multiplied, and by whom: kernels/head_tile.py.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from riskpo_kernels.core.matmul import executed
from riskpo_kernels.core.softmax import BLOCK, LogitMap
from riskpo_kernels.kernels import Configuration, multiprocessors, of_rows
from riskpo_kernels.kernels.head_tile import (
    FORWARDS,
    hits_of,
    operands_of,
    product,
    tile_at,
    tile_configuration,
)
from riskpo_kernels.kernels.tl_math import LN2, LOG2E, LOWEST, at_least, tanh


@triton.jit
def block_statistics(
    x, v, V,
    p_bias, p_top, p_rest, p_gap, p_zt,
    o_r, m_r, target, hits, stride_blocks, inner, outer,
    NEGATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # products x [BM, BLOCK] of the columns from v on; target [BM] counts from the first column;
    # hits: how many rows have theirs among these
    o_v = v + tl.arange(0, BLOCK)  # [BLOCK]
    if p_bias is not None:  # beyond the last column it masks, unless logits are mapped afterwards
        bias = tl.load(p_bias + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
        x += at_least(bias, LOWEST)[None, :]
    if inner is not None:
        x = tanh(x * inner)
    if NEGATIVE:
        x = -x
    if hits > 0:  # of few tiles: this takes as many instructions as two fifths of the rest
        taken = o_v[None, :] == target[:, None]
        z_t = tl.sum(tl.where(taken, x, 0.0), 1)
        z_t = tl.where(z_t <= LOWEST / 2, float("-inf"), z_t * outer)
        tl.store(p_zt + o_r, z_t, mask=(target >= v) & (target < v + BLOCK) & m_r)
        x = tl.where(taken, LOWEST, x)
    if p_bias is None or inner is not None or NEGATIVE:
        x = tl.where((o_v < V)[None, :], x, LOWEST)
    top = tl.max(x, 1)
    k = outer * LOG2E
    y = (x - top[:, None]) * k[:, None]  # in base 2; the difference is exact near the largest
    e = tl.exp2(y)
    s = tl.sum(e, 1)
    log_s = tl.log2(s)
    at = o_r * stride_blocks + v // BLOCK
    # a mask & a number is a number to Triton 3.9's interpreter
    m_b = m_r & (v + tl.zeros_like(o_r) < V)
    tl.store(p_top + at, tl.where(top <= LOWEST / 2, float("-inf"), top * outer), mask=m_b)
    tl.store(p_rest + at, log_s * LN2, mask=m_b)
    if p_gap is not None:
        tl.store(p_gap + at, (log_s - tl.sum(e * y, 1) / s) * LN2, mask=m_b)


@triton.jit(
    do_not_specialize=["R", "first", "offset", "stride_blocks"],
    do_not_specialize_on_alignment=["p_target", "p_temperature", "p_order", "p_zt"],
)
def statistics_kernel(
    d_hidden, d_weight, p_hidden, p_weight, p_bias, p_target, p_temperature, p_order, p_top,
    p_rest, p_gap, p_zt,
    R, V, D, first, offset, stride_h, stride_w, stride_blocks, inner, outer,
    NEGATIVE: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n_r, n_v = tl.cdiv(R, BM), tl.cdiv(V, BN)
    for tile in tl.range(tl.program_id(0), n_r * n_v, tl.num_programs(0), flatten=True):
        i_r, v = tile_at(tile, n_r, n_v, GROUP, BN)
        o_r = i_r.to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
        m_r = o_r < R
        x = product(
            d_hidden, d_weight, p_hidden, p_weight, i_r, v, R, V, D, stride_h, stride_w,
            TMA, BM, BN, BK,
        )  # fmt: skip

        i = first + o_r
        if p_order is not None:
            i = tl.load(p_order + i, mask=m_r, other=0)
        target = tl.load(p_target + i, mask=m_r, other=-1).to(tl.int64) - offset
        target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
        hits = hits_of(target, m_r, v, BN, BLOCK)
        by = tl.full((BM,), 1.0, tl.float32) * outer
        if p_temperature is not None:
            by = outer / tl.load(p_temperature + i, mask=m_r, other=1.0)
        tl.static_assert(BN == BLOCK or BN == 2 * BLOCK)
        if BN == BLOCK:
            parts = (x,)
        else:
            parts = tl.split(tl.permute(tl.reshape(x, (BM, 2, BLOCK)), (0, 2, 1)))
        for j in tl.static_range(BN // BLOCK):
            block_statistics(
                parts[j], v + j * BLOCK, V, p_bias, p_top, p_rest, p_gap, p_zt, o_r, m_r, target,
                (hits >> (16 * j)) & 65535, stride_blocks, inner, by, NEGATIVE, BLOCK,
            )  # fmt: skip


class BlockStatistics(NamedTuple):
    """Of R rows and B blocks of columns; room for them, until the kernel has run."""

    top: torch.Tensor
    rest: torch.Tensor
    gap: torch.Tensor | None
    z_t: torch.Tensor

    @staticmethod
    def new(rows: int, blocks: int, entropy: bool, device: torch.device) -> BlockStatistics:
        room = functools.partial(torch.empty, dtype=torch.float32, device=device)
        gap = room(rows, blocks) if entropy else None
        return BlockStatistics(room(rows, blocks), room(rows, blocks), gap, room(rows))

    def of(self, rows: int) -> BlockStatistics:
        """Room for the first rows."""
        return BlockStatistics(*(None if x is None else x[:rows] for x in self))  # type: ignore[arg-type]

    def columns(self, v: slice) -> BlockStatistics:
        """Room for the blocks of columns v, which begin with a block."""
        at = slice(v.start // BLOCK, -(-v.stop // BLOCK))
        gap = None if self.gap is None else self.gap[:, at]
        return BlockStatistics(self.top[:, at], self.rest[:, at], gap, self.z_t)

    @staticmethod
    def row_bytes(blocks: int, entropy: bool) -> int:
        return 4 * blocks * (2 + entropy) + 4


def statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    order: torch.Tensor | None,
    map: LogitMap,
    out: BlockStatistics,
    *,
    first: int,
    offset: int,
) -> None:
    """Fill `out` for rows hidden [R, D] (unit column stride, as weight [V, D]); row r has target
    and temperature number order[first + r], counted from column `offset`."""
    tile, operands = operands_of(hidden, weight)
    rows, vocab = hidden.shape[0], weight.shape[0]
    row_tiles, column_tiles = -(-rows // tile.rows), -(-vocab // tile.columns)
    executed(row_tiles * tile.rows, column_tiles * tile.columns, hidden.shape[1])
    rows_given = of_rows(map)
    programs = min(row_tiles * column_tiles, multiprocessors(hidden.device))
    statistics_kernel[(programs,)](
        **operands,
        p_bias=bias,
        p_target=target,
        p_order=order,
        p_top=out.top,
        p_rest=out.rest,
        p_gap=out.gap,
        p_zt=out.z_t,
        R=rows,
        V=vocab,
        first=first,
        offset=offset,
        stride_blocks=out.top.stride(0),
        **rows_given | {"outer": abs(rows_given["outer"])},
        NEGATIVE=rows_given["outer"] < 0,
        BLOCK=BLOCK,
    )


def compile_configurations() -> list[Configuration]:
    """What can be launched, see kernels/__init__.py: each way to make a logit in bf16, with the
    entropy; the plain head and the one with everything in fp16 and without the entropy."""
    every = list(itertools.product(*((False, True),) * 3))  # bias, softcap, row temperatures
    plain, most = every[0], every[-1]
    choices = [("bf16", x, False, True) for x in every]
    choices += [("bf16", x, False, False) for x in (plain, most)]
    choices += [("bf16", plain, True, True), ("fp16", plain, False, False)]
    choices += [("fp16", most, True, True)]
    made = []
    for variant, (dtype, logit, negative, entropy) in itertools.product(FORWARDS, choices):
        bias, softcap, per_row = logit
        flags: dict[str, Any] = {"NEGATIVE": negative, "BLOCK": BLOCK}
        types = {"p_target": "i64", "p_order": "i64"}
        given = {"p_bias": bias, "p_temperature": per_row, "p_order": per_row, "p_gap": entropy}
        given |= {"inner": softcap}
        title = f"bias={bias:d} softcap={softcap:d} rows={per_row:d} negative={negative:d} "
        title += f"entropy={entropy:d}"
        made.append(
            tile_configuration(
                "forward", title, statistics_kernel, dtype, variant, types, given, flags
            )
        )
    return made

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

Cost: 2 R V D FLOPs; beside hidden and weight it writes 8 or 12 bytes per row and block. Tiles are
handed out in groups of GROUP row tiles, which then share columns of the weight in the L2 cache.
Loads go through tensor-map descriptors (TMA) where FORWARDS says so and strides and addresses are
multiples of 16 bytes, else through pointers.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from riskpo_kernels.core.matmul import executed
from riskpo_kernels.core.softmax import BLOCK, LogitMap
from riskpo_kernels.kernels import Configuration, capability_of, multiprocessors, signature_of
from riskpo_kernels.kernels.tl_math import LN2, LOG2E, LOWEST, at_least, tanh

GROUP = 16


class Tile(NamedTuple):
    """One variant of the kernel: rows, columns and depth of a tile, how it is launched, whether it
    loads through TMA, and where it is launched, as 10 x compute capability (empty: wherever no
    other is)."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    tma: bool
    archs: tuple[int, ...] = ()


# The launcher, the compile gate and the benchmarks read this table. A wider tile that spills on an
# architecture is not in it (docs/kernel-notes.md).
FORWARDS = {
    "hopper": Tile(128, 256, 64, 8, 4, True, (90,)),
    "blackwell": Tile(128, 128, 64, 8, 3, True, (100, 103)),
    "ampere": Tile(128, 128, 32, 8, 4, False, (80,)),
    "pointers": Tile(64, 128, 32, 8, 4, False),
}


def forward_on(capability: tuple[int, int], tma: bool) -> str:
    """The row of FORWARDS that is launched."""
    arch = 10 * capability[0] + capability[1]
    return next((k for k, x in FORWARDS.items() if arch in x.archs and x.tma <= tma), "pointers")


@triton.jit
def block_statistics(
    x,
    v,
    V,
    p_bias,
    p_top,
    p_rest,
    p_gap,
    p_zt,
    o_r,
    m_r,
    target,
    hits,
    stride_blocks,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # products x [BM, BLOCK] of the columns from v on; target [BM] counts from the first column;
    # hits: how many rows have theirs among these
    o_v = v + tl.arange(0, BLOCK)  # [BLOCK]
    if HAS_BIAS:
        bias = tl.load(p_bias + o_v, mask=o_v < V, other=0.0).to(tl.float32)
        x += at_least(bias, LOWEST)[None, :]
    if HAS_SOFTCAP:
        x = tanh(x * inner)
    if NEGATIVE:
        x = -x
    if hits > 0:  # of few tiles: this takes as many instructions as two fifths of the rest
        taken = o_v[None, :] == target[:, None]
        z_t = tl.sum(tl.where(taken, x, 0.0), 1)
        z_t = tl.where(z_t <= LOWEST / 2, float("-inf"), z_t * outer)
        tl.store(p_zt + o_r, z_t, mask=(target >= v) & (target < v + BLOCK) & m_r)
        x = tl.where(taken, LOWEST, x)
    x = tl.where((o_v < V)[None, :], x, LOWEST)
    top = tl.max(x, 1)
    k = outer * LOG2E
    y = (x - top[:, None]) * k[:, None]  # in base 2; the difference is exact near the largest
    e = tl.exp2(y)
    s = tl.sum(e, 1)
    log_s = tl.log2(s)
    at = o_r * stride_blocks + v // BLOCK
    m_b = m_r & (v < V)
    tl.store(p_top + at, tl.where(top <= LOWEST / 2, float("-inf"), top * outer), mask=m_b)
    tl.store(p_rest + at, log_s * LN2, mask=m_b)
    if ENTROPY:
        tl.store(p_gap + at, (log_s - tl.sum(e * y, 1) / s) * LN2, mask=m_b)


@triton.jit(
    do_not_specialize=["R", "first", "offset", "stride_blocks"],
    do_not_specialize_on_alignment=["p_target", "p_temperature", "p_order", "p_zt"],
)
def statistics_kernel(
    d_hidden,
    d_weight,
    p_hidden,
    p_weight,
    p_bias,
    p_target,
    p_temperature,
    p_order,
    p_top,
    p_rest,
    p_gap,
    p_zt,
    R,
    V,
    D,
    first,
    offset,
    stride_h,
    stride_w,
    stride_blocks,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    NEGATIVE: tl.constexpr,
    ENTROPY: tl.constexpr,
    TMA: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n_r, n_v = tl.cdiv(R, BM), tl.cdiv(V, BN)
    for tile in tl.range(tl.program_id(0), n_r * n_v, tl.num_programs(0), flatten=True):
        first_tile = tile // (GROUP * n_v) * GROUP
        n_here = tl.minimum(n_r - first_tile, GROUP)
        i_r = first_tile + tile % (GROUP * n_v) % n_here
        v = tile % (GROUP * n_v) // n_here * BN
        o_r = i_r.to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
        m_r = o_r < R

        x = tl.full((BM, BN), 0.0, tl.float32)
        for d in range(0, D, BK):
            if TMA:
                h = d_hidden.load([i_r * BM, d])  # [BM, BK]
                w = d_weight.load([v, d])  # [BN, BK]
            else:
                o_d = d + tl.arange(0, BK)
                o_w = v.to(tl.int64) + tl.arange(0, BN)
                m_d = (o_d < D)[None, :]
                h_at = p_hidden + o_r[:, None] * stride_h + o_d[None, :]
                w_at = p_weight + o_w[:, None] * stride_w + o_d[None, :]
                h = tl.load(h_at, mask=m_r[:, None] & m_d, other=0.0)
                w = tl.load(w_at, mask=(o_w < V)[:, None] & m_d, other=0.0)
            x = tl.dot(h, tl.trans(w), x, input_precision="ieee")

        i = first + o_r
        if HAS_ORDER:
            i = tl.load(p_order + i, mask=m_r, other=0)
        target = tl.load(p_target + i, mask=m_r, other=-1).to(tl.int64) - offset
        target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
        j_t = tl.where(m_r & (target >= v) & (target < v + BN), (target - v) // BLOCK, 2)
        hits = tl.sum(tl.where(j_t == 0, 1, tl.where(j_t == 1, 65536, 0)), 0)  # of both blocks
        by = tl.full((BM,), 1.0, tl.float32) * outer
        if HAS_TEMPERATURE:
            by = outer / tl.load(p_temperature + i, mask=m_r, other=1.0)
        tl.static_assert(BN == BLOCK or BN == 2 * BLOCK)
        if BN == BLOCK:
            parts = (x,)
        else:
            parts = tl.split(tl.permute(tl.reshape(x, (BM, 2, BLOCK)), (0, 2, 1)))
        for j in tl.static_range(BN // BLOCK):
            block_statistics(
                parts[j], v + j * BLOCK, V, p_bias, p_top, p_rest, p_gap, p_zt, o_r, m_r, target,
                (hits >> (16 * j)) & 65535, stride_blocks, inner, by, HAS_BIAS, HAS_SOFTCAP,
                NEGATIVE, ENTROPY, BLOCK,
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
    can = _tma(hidden) and _tma(weight)
    tile = FORWARDS[forward_on(capability_of(hidden.device), can)]
    tma = tile.tma
    rows, vocab = hidden.shape[0], weight.shape[0]
    row_tiles, column_tiles = -(-rows // tile.rows), -(-vocab // tile.columns)
    executed(row_tiles * tile.rows, column_tiles * tile.columns, hidden.shape[1])
    inner, outer, per_row = map.factors()
    d_hidden, d_weight = (
        TensorDescriptor.from_tensor(x, [n, tile.depth]) if tma else None
        for x, n in ((hidden, tile.rows), (weight, tile.columns))
    )
    programs = min(row_tiles * column_tiles, multiprocessors(hidden.device))
    statistics_kernel[(programs,)](
        d_hidden=d_hidden,
        d_weight=d_weight,
        p_hidden=None if tma else hidden,
        p_weight=None if tma else weight,
        p_bias=bias,
        p_target=target,
        p_temperature=per_row,
        p_order=order,
        p_top=out.top,
        p_rest=out.rest,
        p_gap=out.gap,
        p_zt=out.z_t,
        R=rows,
        V=vocab,
        D=hidden.shape[1],
        first=first,
        offset=offset,
        stride_h=hidden.stride(0),
        stride_w=weight.stride(0),
        stride_blocks=out.top.stride(0),
        inner=inner,
        outer=abs(outer),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=map.softcap is not None,
        HAS_TEMPERATURE=per_row is not None,
        HAS_ORDER=order is not None,
        NEGATIVE=outer < 0,
        ENTROPY=out.gap is not None,
        TMA=tma,
        GROUP=GROUP,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        BLOCK=BLOCK,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _tma(x: torch.Tensor) -> bool:
    """Whether x [n, D] can be read through a tensor map; rows of an expanded tensor cannot."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    aligned = aligned and x.stride(0) >= x.shape[1]
    return aligned and x.stride(1) == 1 and x.numel() > 0 and capability_of(x.device) >= (9, 0)


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
    for (variant, tile), (dtype, logit, negative, entropy) in itertools.product(
        FORWARDS.items(), choices
    ):
        bias, softcap, per_row = logit
        flags: dict[str, Any] = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "ENTROPY": entropy}
        flags |= {"HAS_TEMPERATURE": per_row, "HAS_ORDER": per_row, "NEGATIVE": negative}
        flags |= {"TMA": tile.tma, "GROUP": GROUP, "BLOCK": BLOCK}
        flags |= {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth}
        types = {"p_hidden": dtype, "p_weight": dtype, "p_target": "i64", "p_order": "i64"}
        types |= {"d_hidden": f"tensordesc<{dtype}[{tile.rows},{tile.depth}]>"}
        types |= {"d_weight": f"tensordesc<{dtype}[{tile.columns},{tile.depth}]>"}
        given = {"p_bias": bias, "p_temperature": per_row, "p_order": per_row, "p_gap": entropy}
        given |= dict.fromkeys(("d_hidden", "d_weight"), tile.tma)
        given |= dict.fromkeys(("p_hidden", "p_weight"), not tile.tma)
        found = signature_of(statistics_kernel, types, given, flags)
        title = f"forward-{variant}-dot{'-tma' if tile.tma else ''} {dtype} bias={bias:d} "
        title += f"softcap={softcap:d} rows={per_row:d} negative={negative:d} entropy={entropy:d}"
        launched: Any = tile.warps, tile.stages, {}, tile.archs
        made.append(Configuration(title, statistics_kernel, *found, *launched))
    return made

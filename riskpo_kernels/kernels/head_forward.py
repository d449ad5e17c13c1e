"""The forward of a head as one persistent product with the softmax statistics in its epilogue.

    z = softcap(scale * (h W^T + b)) / T, in tiles [BM, 128] that never leave the registers

A job is BM rows x SPAN columns. Its 128-column tiles are folded into m, s, u, z_t of the rows
(lm_head/softmax.py), written once per job; `combine` in core/rows.py puts the parts of a row
together. A tile is one vocabulary block, whose log-sum-exp the choice of active blocks needs.

    tensor            shape              dtype
    hidden, weight    [R, D], [V, D]     bf16, fp16 (fp32 in the interpreter)
    target            [R]                int64, negative or beyond V: no column of it
    parts m s u z_t   [V / SPAN, R]      fp32
    blocks            [R, V / 128]       fp32, log-sum-exp without the target

Cost: 2 R V D FLOPs; beside hidden and weight it writes 16 bytes per row and SPAN columns, and 4 per
row and block. Jobs are handed out in groups of GROUP row tiles, which then share columns of the
weight in the L2 cache. Loads go through tensor-map descriptors (TMA) on compute capability 9.0 and
newer where strides and addresses are multiples of 16 bytes, else through pointers.
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
from riskpo_kernels.core.rows import BLOCK, LogitMap, RowState, combine
from riskpo_kernels.core.rows import FLOOR as LOG_FLOOR
from riskpo_kernels.kernels import Configuration, signature_of
from riskpo_kernels.kernels.tl_math import logits_of, online_softmax

SPAN = 8 * BLOCK  # never a function of R: the order of a row's sums must not depend on its company
GROUP = 16
FLOOR = tl.constexpr(LOG_FLOOR)


class Shape(NamedTuple):
    """Rows and depth of a tile, and how it is launched. specialised: a warp group that only loads
    (takes effect with 4 warps and TMA)."""

    rows: int
    depth: int
    warps: int
    stages: int
    specialised: bool = False


SHAPES = {
    "gemm": Shape(128, 64, 8, 3),
    "gemm, warp-specialised": Shape(64, 64, 4, 4, specialised=True),
}
# On other architectures 128 rows x 128 columns spill in some configuration, and so does a depth of
# 64 through pointers (docs/kernel-notes.md)
NARROW, POINTERS = Shape(64, 64, 8, 3), Shape(64, 32, 8, 4)


@triton.jit(
    do_not_specialize=["R"],
    do_not_specialize_on_alignment=["p_target", "p_temperature", "p_blocks"],
)
def statistics_kernel(
    d_hidden,
    d_weight,
    p_hidden,
    p_weight,
    p_bias,
    p_target,
    p_temperature,
    p_m,
    p_s,
    p_u,
    p_zt,
    p_blocks,
    R,
    V,
    D,
    stride_h,
    stride_w,
    stride_blocks,
    scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALISED: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
):
    n_tiles, n_spans = tl.cdiv(R, BM), tl.cdiv(V, SPAN)
    for job in range(tl.program_id(0), n_tiles * n_spans, tl.num_programs(0)):
        first_tile = job // (GROUP * n_spans) * GROUP
        n_here = tl.minimum(n_tiles - first_tile, GROUP)
        i_r = first_tile + job % (GROUP * n_spans) % n_here
        i_s = job % (GROUP * n_spans) // n_here
        o_r = i_r.to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
        m_r = o_r < R

        target = tl.load(p_target + o_r, mask=m_r, other=-1)
        target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
        t = temperature
        if HAS_TEMPERATURE:
            t = tl.load(p_temperature + o_r, mask=m_r, other=1.0)[:, None]
        m = tl.full((BM,), float("-inf"), tl.float32)
        s = tl.full((BM,), 0.0, tl.float32)
        u, zt = s, m

        for v in range(i_s * SPAN, tl.minimum((i_s + 1) * SPAN, V), BLOCK):
            o_v = v + tl.arange(0, BLOCK)  # [BLOCK]
            m_v = o_v < V
            x = tl.full((BM, BLOCK), 0.0, tl.float32)
            for k in tl.range(0, D, BK, warp_specialize=SPECIALISED):
                if TMA:
                    h = d_hidden.load([i_r * BM, k])  # [BM, BK]
                    w = d_weight.load([v, k])  # [BLOCK, BK]
                else:
                    o_k = k + tl.arange(0, BK)
                    m_k = (o_k < D)[None, :]
                    h_at = p_hidden + o_r[:, None] * stride_h + o_k[None, :]
                    w_at = p_weight + o_v.to(tl.int64)[:, None] * stride_w + o_k[None, :]
                    h = tl.load(h_at, mask=m_r[:, None] & m_k, other=0.0)
                    w = tl.load(w_at, mask=m_v[:, None] & m_k, other=0.0)
                x = tl.dot(h, tl.trans(w), x, input_precision="ieee")
            if HAS_BIAS:
                x += tl.load(p_bias + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
            z, _ = logits_of(x, scale, softcap, t, HAS_SOFTCAP)

            z = tl.where(m_v[None, :], z, float("-inf"))
            taken = o_v[None, :] == target[:, None]
            here = (target >= v) & (target < v + BLOCK)
            m, s, u, zt, e, anchor = online_softmax(z, taken, here, m, s, u, zt, ENTROPY, FLOOR)
            if HAS_BLOCKS:
                at = p_blocks + o_r * stride_blocks + v // BLOCK
                tl.store(at, anchor + tl.log(tl.sum(e, 1)), mask=m_r)

        o = i_s.to(tl.int64) * R + o_r
        tl.store(p_m + o, m, mask=m_r)
        tl.store(p_s + o, s, mask=m_r)
        tl.store(p_zt + o, zt, mask=m_r)
        if ENTROPY:
            tl.store(p_u + o, u, mask=m_r)


def parts_of(rows: int, vocab: int, entropy: bool, device: torch.device) -> RowState:
    """Memory for the statistics of every job, [V / SPAN, R] each."""
    shape = (triton.cdiv(vocab, SPAN), rows)
    m, s, u, zt = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(4))
    return RowState(m, s, u if entropy else None, zt)


def statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    map: LogitMap,
    blocks: torch.Tensor | None,
    *,
    entropy: bool,
    shape: str,
) -> RowState:
    """The softmax state [R] of rows hidden [R, D] (unit column stride, as weight [V, D]); blocks
    [R, V / 128] takes the blocks' log-sum-exps. shape: a key of SHAPES."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    parts = parts_of(rows, vocab, entropy, hidden.device)
    if rows:
        with torch.cuda.device_of(hidden):
            _launch(hidden, weight, target, bias, map, blocks, parts, shape)
    return combine(parts)


def _launch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    map: LogitMap,
    blocks: torch.Tensor | None,
    parts: RowState,
    shape: str,
) -> None:
    tma = _tma(hidden) and _tma(weight)
    tile = shape_on(shape, _capability(hidden.device), tma)
    per_row = map.temperature if isinstance(map.temperature, torch.Tensor) else None
    row_tiles = triton.cdiv(hidden.shape[0], tile.rows)
    jobs = row_tiles * parts.m.shape[0]
    descriptors = (
        TensorDescriptor.from_tensor(x, [n, tile.depth]) if tma else None
        for x, n in ((hidden, tile.rows), (weight, BLOCK))
    )
    d_hidden, d_weight = descriptors
    columns = triton.cdiv(weight.shape[0], BLOCK) * BLOCK
    executed(row_tiles * tile.rows, columns, hidden.shape[1])
    statistics_kernel[(min(jobs, multiprocessors(hidden.device)),)](
        d_hidden=d_hidden,
        d_weight=d_weight,
        p_hidden=None if tma else hidden,
        p_weight=None if tma else weight,
        p_bias=bias,
        p_target=target,
        p_temperature=per_row,
        p_m=parts.m,
        p_s=parts.s,
        p_u=parts.u,
        p_zt=parts.zt,
        p_blocks=blocks,
        R=hidden.shape[0],
        V=weight.shape[0],
        D=hidden.shape[1],
        stride_h=hidden.stride(0),
        stride_w=weight.stride(0),
        stride_blocks=0 if blocks is None else blocks.stride(0),
        scale=map.scale,
        softcap=map.softcap or 1.0,
        temperature=1.0 if per_row is not None else map.temperature,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=map.softcap is not None,
        HAS_TEMPERATURE=per_row is not None,
        ENTROPY=parts.u is not None,
        HAS_BLOCKS=blocks is not None,
        TMA=tma,
        SPECIALISED=tile.specialised,
        GROUP=GROUP,
        SPAN=SPAN,
        BM=tile.rows,
        BLOCK=BLOCK,
        BK=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def shape_on(shape: str, capability: tuple[int, int], tma: bool) -> Shape:
    """The tile that is launched: SHAPES are Hopper's, and need TMA."""
    if not tma:
        return POINTERS
    return SHAPES[shape] if capability[0] == 9 else NARROW


def _tma(x: torch.Tensor) -> bool:
    """Whether x [n, D] can be read through a tensor map; rows of an expanded tensor cannot."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    aligned = aligned and x.stride(0) >= x.shape[1]
    return aligned and x.stride(1) == 1 and x.numel() > 0 and _capability(x.device) >= (9, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    # the interpreter runs what Hopper would
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Those of a GPU; in the interpreter few, so that each persistent program has several jobs."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


# (bias, softcap, row temperatures, blocks): each two of them in all four ways; the first is what a
# plain head launches, the last has everything to hold at once
PAIRWISE = [tuple(c == "1" for c in x) for x in ("0001", "0110", "1010", "1100", "1111")]


def compile_configurations() -> list[Configuration]:
    """What can be launched, see kernels/__init__.py: all of it in bf16 with the entropy; without
    it, where there is less to hold, and in fp16, which differs in the operands' type, a part."""
    ways: list[tuple[str, Shape, bool, tuple[int, ...]]] = [
        (name, shape, True, (90,)) for name, shape in SHAPES.items()
    ]
    ways += [("narrow", NARROW, True, (100,)), ("pointers", POINTERS, False, ())]
    choices: list[tuple[Any, ...]] = [
        ("bf16", *x, True) for x in itertools.product(*((False, True),) * 4)
    ]
    choices += [("bf16", *x, False) for x in PAIRWISE]
    choices += [("fp16", *PAIRWISE[0], entropy) for entropy in (False, True)]
    choices += [("fp16", *PAIRWISE[-1], True)]
    return [_configuration(*way, *choice) for way, choice in itertools.product(ways, choices)]  # type: ignore[arg-type]


def _configuration(
    shape_name: str,
    shape: Shape,
    tma: bool,
    archs: tuple[int, ...],
    dtype: str,
    bias: bool,
    softcap: bool,
    per_row: bool,
    blocks: bool,
    entropy: bool,
) -> Configuration:
    flags: dict[str, Any] = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "ENTROPY": entropy}
    flags |= {"HAS_TEMPERATURE": per_row, "HAS_BLOCKS": blocks, "TMA": tma, "GROUP": GROUP}
    flags |= {"SPECIALISED": shape.specialised, "SPAN": SPAN, "BLOCK": BLOCK}
    flags |= {"BM": shape.rows, "BK": shape.depth}
    types = {"p_hidden": dtype, "p_weight": dtype, "p_target": "i64"}
    types |= {"d_hidden": f"tensordesc<{dtype}[{shape.rows},{shape.depth}]>"}
    types |= {"d_weight": f"tensordesc<{dtype}[{BLOCK},{shape.depth}]>"}
    given = {"p_bias": bias, "p_temperature": per_row, "p_blocks": blocks, "p_u": entropy}
    given |= dict.fromkeys(("d_hidden", "d_weight"), tma)
    given |= dict.fromkeys(("p_hidden", "p_weight"), not tma)
    signature, constexprs = signature_of(statistics_kernel, types, given, flags)
    title = f"forward-{shape_name.replace(', ', '-')}-dot{'-tma' if tma else ''}"
    title += f" {dtype} bias={bias:d} softcap={softcap:d} rows={per_row:d} blocks={blocks:d}"
    title += f" entropy={entropy:d}"
    launch = (shape.warps, shape.stages)
    return Configuration(title, statistics_kernel, signature, constexprs, *launch, {}, archs)

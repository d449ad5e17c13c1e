"""The gradient of the logits of kernels/support_pairs.py, and the sums it goes into.

    dx = dz softcap'(scale * x)       dz of softmax_rows.py's three numbers a row
    dH[r]  = sum dx w_id              over the pairs of a row
    dW[id] = sum dx h_r               over the pairs of an id, sorted by it
    db[id] = sum dx

    tensor    shape      dtype
    dz        [P]        fp32, dx of each pair; 0 where it has no logit
    index     [P]        int32, which row of source [S, D]; one below 0 is not read
    first     [n + 1]    int64, where the segments of `index` begin
    place     [P]        int32, which row of out a segment that begins here is for

segment_kernel has one program for BD columns of a segment: float32 sums, rounded once. No atomics:
the order of a segment is the order of its sum. Neighbouring programs take the same columns, so that
a run of BD columns of all hidden states (512 bytes a row in 16 bits) stays in the L2 cache.

Cost: P D multiply-adds for each of dH and dW, as many numbers read, and nothing of [P, D] written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from riskpo_kernels.core.gradient import RowGradient
from riskpo_kernels.core.matmul import executed
from riskpo_kernels.core.softmax import FLOOR as LOG_FLOOR
from riskpo_kernels.core.softmax import LogitMap
from riskpo_kernels.kernels import Configuration, configuration, of_rows
from riskpo_kernels.kernels.support_pairs import BD, BP, TYPES, WARPS, Pairs
from riskpo_kernels.kernels.tl_math import logits_gradient, logits_of

MANY = 512  # pairs of a program of pair_dz_kernel
FLOOR = tl.constexpr(LOG_FLOOR)
PER_ROW = "target temperature at_target offset slope peak log_sum".split()


@triton.jit(do_not_specialize=["P"], do_not_specialize_on_alignment=[f"p_{x}" for x in PER_ROW])
def pair_dz_kernel(
    p_x, p_ids, p_rows, p_target, p_temperature, p_at_target, p_offset, p_slope, p_peak, p_log_sum,
    p_dz,
    P, inner, outer,
    MANY: tl.constexpr,
):  # fmt: skip
    o_p = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)  # [MANY]
    v = tl.load(p_ids + o_p, mask=o_p < P, other=-1)
    m_p = v >= 0
    r = tl.load(p_rows + o_p, mask=m_p, other=0)
    x = tl.load(p_x + o_p, mask=m_p, other=0.0)
    if p_temperature is not None:
        outer = outer / tl.load(p_temperature + r, mask=m_p, other=1.0)
    z, cap_slope = logits_of(x, inner, outer)
    peak = tl.load(p_peak + r, mask=m_p, other=0.0)
    log_sum = tl.load(p_log_sum + r, mask=m_p, other=0.0)
    at_target = tl.load(p_at_target + r, mask=m_p, other=0.0)
    offset = tl.load(p_offset + r, mask=m_p, other=0.0)
    slope = None
    if p_slope is not None:
        slope = tl.load(p_slope + r, mask=m_p, other=0.0)
    log_p = ((z - peak) - log_sum)[:, None]
    taken = (v == tl.load(p_target + r, mask=m_p, other=-1))[:, None]
    dz = logits_gradient(log_p, taken, at_target, offset, slope, FLOOR)  # [MANY, 1]
    dz = tl.where(m_p, tl.reshape(dz, (MANY,)) * cap_slope, 0.0)
    tl.store(p_dz + o_p, dz, mask=o_p < P)


@triton.jit(do_not_specialize=["ROWS"], do_not_specialize_on_alignment=["p_first"])
def segment_kernel(
    p_source, p_index, p_dz, p_first, p_place, p_out,
    D, ROWS, stride_source, stride_out,
    BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # out[i] = sum dz source[index] over segment i [BD]; with a place out[place[first[i]]], of
    # which there are ROWS: beyond them, and beyond the last segment, nothing is read or written
    i = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)  # [BD]
    first, last = tl.load(p_first + i), tl.load(p_first + i + 1)
    row = i
    if p_place is not None:
        row = tl.load(p_place + first, mask=first < last, other=ROWS).to(tl.int64)
        last = tl.where(row < ROWS, last, first)
    m_d = o_d < D
    out = tl.full((BP, BD), 0.0, tl.float32)
    for j in range(first, last, BP):
        o_p = j + tl.arange(0, BP)  # [BP]
        at = tl.load(p_index + o_p, mask=o_p < last, other=-1).to(tl.int64)
        m_p = at >= 0
        dz = tl.load(p_dz + o_p, mask=m_p, other=0.0)
        x = tl.load(
            p_source + at[:, None] * stride_source + o_d[None, :],
            mask=m_p[:, None] & m_d[None, :],
            other=0.0,
        )  # [BP, BD]
        out += dz[:, None] * x.to(tl.float32)
    m_out = m_d & (row + tl.zeros_like(o_d) < ROWS)  # a tensor: see head_forward.block_statistics
    total = tl.sum(out, 0).to(p_out.dtype.element_ty)
    tl.store(p_out + row * stride_out + o_d, total, mask=m_out)


def pair_gradients(
    x: torch.Tensor, pairs: Pairs, target: torch.Tensor, map: LogitMap, up: RowGradient
) -> torch.Tensor:
    """dz [P] of x; 0 where a pair has no logit."""
    dz, n = torch.empty_like(x), x.numel()
    if n:
        pair_dz_kernel[(-(-n // MANY),)](
            p_x=x,
            p_ids=pairs.ids,
            p_rows=pairs.rows,
            p_target=target,
            **of_rows(map, up),
            p_dz=dz,
            P=n,
            MANY=MANY,
            num_warps=WARPS,
        )
    return dz


def segment_sums(
    source: torch.Tensor,
    index: torch.Tensor,
    dz: torch.Tensor,
    first: torch.Tensor,
    place: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Fill out [S, D] from segments first [S + 1] of index and dz [P]; with place [P] the rows that
    it names, at the beginning of a segment, of an out [V, D]."""
    segments, (rows, width) = first.numel() - 1, out.shape
    executed(index.numel(), width)
    if segments and rows:
        segment_kernel[(segments, -(-width // BD))](
            p_source=source,
            p_index=index,
            p_dz=dz,
            p_first=first,
            p_place=place,
            p_out=out,
            D=width,
            ROWS=rows,
            stride_source=source.stride(0),
            stride_out=out.stride(0),
            BP=BP,
            BD=BD,
            num_warps=WARPS,
        )


def compile_configurations() -> list[Configuration]:
    """What can be launched, see kernels/__init__.py: of dz the plainest form and the fullest, and
    every dtype of what is gathered and of what is written."""
    made = []
    for full in (False, True):
        given = {"p_temperature": full, "p_slope": full, "inner": full}
        name = f"support-dz full={full:d}"
        made.append(configuration(name, pair_dz_kernel, TYPES, given, {"MANY": MANY}, WARPS))
    alone = {"D": 1, "stride_source": 1, "stride_out": 1}  # dbias: the JIT makes constants of ones
    ways: list[tuple[str, str, bool, dict[str, int]]]
    ways = [("bf16", "bf16", False, {}), ("bf16", "bf16", True, {}), ("fp16", "fp16", True, {})]
    ways += [("fp32", "bf16", False, {}), ("bf16", "fp32", True, {}), ("fp32", "bf16", True, alone)]
    for source, out, place, sizes in ways:
        types = TYPES | {"p_index": "i32", "p_place": "i32", "p_source": source, "p_out": out}
        given, flags = {"p_place": place}, {"BP": BP, "BD": BD} | sizes
        name = f"support-sums {source}->{out} place={place:d}{' D=1' if sizes else ''}"
        made.append(configuration(name, segment_kernel, types, given, flags, WARPS))
    return made

"""A head's logits for pairs (row, id) alone, and their softmax row by row.

    x = h_r . w_id + b_id        z = softcap(scale * x) / T

Pairs lie row by row, as in CSR: row r has pairs first[r] .. first[r + 1]. An id below 0 has no
logit, and neither its hidden state nor its row of the head is read.

    tensor            shape            dtype
    hidden, weight    [N, D], [V, D]   fp32, bf16, fp16; any row stride, unit column stride
    ids, rows         [P]              int32: column and row of each pair
    first             [N + 1]          int64
    target            [N]              int64; IGNORED: a row whose results are 0
    x                 [P]              fp32
    results           [N]              fp32, as of softmax_rows.py; or its state m, u, s, z_t

A row of the head meets another hidden state in each pair: there is no tile for a tensor core. A
program multiplies BP pairs in float32, in BD lanes that are added at the end. One warp folds a
row's logits. No atomics, and the bits of a row do not depend on the rows beside it.

Cost: P D multiply-adds. 2 P D numbers are read, those of hidden from the L1 cache, where pairs of
the same row follow each other. kernels/support_gradient.py is the way back.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from riskpo_kernels.core.matmul import executed
from riskpo_kernels.core.softmax import FLOOR as LOG_FLOOR
from riskpo_kernels.core.softmax import IGNORED as UNREAD
from riskpo_kernels.core.softmax import LogitMap
from riskpo_kernels.kernels import Configuration, configuration, of_rows
from riskpo_kernels.kernels.tl_math import (
    LN2,
    LOG2E,
    LOWEST,
    at_least,
    logits_of,
    row_results,
)

BP, BD, WARPS = 8, 256, 4  # 16 numbers a thread of each gathered tile: two loads of 16 bytes
RUN = 128  # pairs that a row's only warp folds at once
FLOOR, IGNORED = tl.constexpr(LOG_FLOOR), tl.constexpr(UNREAD)
TYPES = {"p_ids": "i32", "p_rows": "i32", "p_first": "i64", "p_target": "i64"}


@triton.jit(do_not_specialize=["P"])
def pair_logits_kernel(
    p_hidden, p_weight, p_bias, p_ids, p_rows, p_x,
    P, D, stride_h, stride_w,
    BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_p = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)  # [BP]
    v = tl.load(p_ids + o_p, mask=o_p < P, other=-1).to(tl.int64)
    m_p = v >= 0
    r = tl.load(p_rows + o_p, mask=m_p, other=0).to(tl.int64)
    x = tl.full((BP, BD), 0.0, tl.float32)
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        m_x = m_p[:, None] & (o_d < D)[None, :]
        h = tl.load(p_hidden + r[:, None] * stride_h + o_d[None, :], mask=m_x, other=0.0)
        w = tl.load(p_weight + v[:, None] * stride_w + o_d[None, :], mask=m_x, other=0.0)
        x += h.to(tl.float32) * w.to(tl.float32)
    logit = tl.sum(x, 1)
    if p_bias is not None:
        logit += tl.load(p_bias + v, mask=m_p, other=0.0).to(tl.float32)
    tl.store(p_x + o_p, logit, mask=o_p < P)


@triton.jit(do_not_specialize_on_alignment=["p_first", "p_target", "p_temperature"])
def pair_rows_kernel(
    p_x, p_ids, p_first, p_target, p_temperature, p_logprob, p_entropy, p_total, p_peak, p_log_sum,
    inner, outer,
    RUN: tl.constexpr,
):  # fmt: skip
    # without a log_sum: m, s, u and z_t into logprob, total, entropy and peak, for ranks to merge
    r = tl.program_id(0).to(tl.int64)
    target = tl.load(p_target + r)
    live = target != IGNORED
    if p_temperature is not None:
        outer = outer / tl.load(p_temperature + r)
    m, s, u = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32), 0.0
    z_t, places = tl.full((), 0.0, tl.float32), tl.full((), 0, tl.int32)
    last = tl.load(p_first + r + 1)
    for i in range(tl.load(p_first + r), last, RUN):
        o_p = i + tl.arange(0, RUN)  # [RUN]
        v = tl.load(p_ids + o_p, mask=o_p < last, other=-1)
        here = v >= 0
        x = tl.load(p_x + o_p, mask=here, other=0.0)
        z, _ = logits_of(x, inner, outer)
        taken = here & (v == target)
        z_t += tl.sum(tl.where(taken, z, 0.0), 0)  # a maximum would lose a NaN
        places += tl.sum(taken.to(tl.int32), 0)
        z = tl.where(here & (v != target), z, float("-inf"))
        new = tl.maximum(m, tl.max(z, 0))
        y = (z - new) * LOG2E
        e = tl.exp2(y)
        shift = tl.maximum((m - new) * LOG2E, FLOOR)  # exp2(FLOOR) = 0, and 0 * FLOOR is not NaN
        keep = tl.exp2(shift)
        if p_entropy is not None:
            u = keep * (u + s * shift) + tl.sum(e * at_least(y, FLOOR), 0)
        s = s * keep + tl.sum(e, 0)
        m = new
    z_t = tl.where(places > 0, z_t, float("-inf"))
    m = tl.where(m == LOWEST, float("-inf"), m)
    if p_log_sum is None:
        tl.store(p_logprob + r, m)
        tl.store(p_total + r, s)
        tl.store(p_peak + r, z_t)
        if p_entropy is not None:
            tl.store(p_entropy + r, u * LN2)
    else:
        logprob, entropy, peak, log_sum, _ = row_results(m, m - z_t, s, u * LN2, z_t)
        tl.store(p_logprob + r, tl.where(live, logprob, 0.0))
        tl.store(p_total + r, tl.where(live, peak + log_sum, 0.0))
        tl.store(p_peak + r, tl.where(live, peak, 0.0))
        tl.store(p_log_sum + r, tl.where(live, log_sum, 0.0))
        if p_entropy is not None:
            tl.store(p_entropy + r, tl.where(live, entropy, 0.0))


class Pairs(NamedTuple):
    """Where pairs lie; ids below 0 have no logit."""

    ids: torch.Tensor
    rows: torch.Tensor
    first: torch.Tensor


def pair_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pairs: Pairs
) -> torch.Tensor:
    """x [P]; 0 where a pair has no logit."""
    n = pairs.ids.numel()
    x = torch.empty(n, dtype=torch.float32, device=hidden.device)
    executed(n, hidden.shape[1])
    if n:
        pair_logits_kernel[(-(-n // BP),)](
            p_hidden=hidden,
            p_weight=weight,
            p_bias=bias,
            p_ids=pairs.ids,
            p_rows=pairs.rows,
            p_x=x,
            P=n,
            D=hidden.shape[1],
            stride_h=hidden.stride(0),
            stride_w=weight.stride(0),
            BP=BP,
            BD=BD,
            num_warps=WARPS,
        )
    return x


def fold_pairs(
    x: torch.Tensor,
    pairs: Pairs,
    target: torch.Tensor,
    map: LogitMap,
    results: list[torch.Tensor | None],
) -> None:
    """logprob, entropy (or None), lse, peak and log_sum [N] into `results`; without a log_sum m, u,
    s and z_t into the first four."""
    names = ("p_logprob", "p_entropy", "p_total", "p_peak", "p_log_sum")
    if target.numel():
        pair_rows_kernel[(target.numel(),)](
            p_x=x,
            p_ids=pairs.ids,
            p_first=pairs.first,
            p_target=target,
            **of_rows(map),
            RUN=RUN,
            num_warps=1,
            **dict(zip(names, results, strict=True)),
        )


def compile_configurations() -> list[Configuration]:
    """What can be launched, see kernels/__init__.py: each dtype; of rows the plainest form and the
    fullest."""
    made = []
    for h, w, bias in (("bf16", "bf16", True), ("fp16", "fp16", False), ("bf16", "fp32", True)):
        types = TYPES | {"p_hidden": h, "p_weight": w, "p_bias": w}
        given, flags = {"p_bias": bias}, {"BP": BP, "BD": BD}
        name = f"support-logits {h} {w} bias={bias:d}"
        made.append(configuration(name, pair_logits_kernel, types, given, flags, WARPS))
    for full, state in itertools.product((False, True), repeat=2):
        given = {"p_temperature": full, "p_entropy": full, "inner": full}
        given |= {"p_log_sum": not state}
        name = f"support-rows full={full:d} state={state:d}"
        made.append(configuration(name, pair_rows_kernel, TYPES, given, {"RUN": RUN}, 1))
    return made

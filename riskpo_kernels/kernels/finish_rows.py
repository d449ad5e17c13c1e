"""What a row needs, from the statistics of its blocks (kernels/head_forward.py). Of a large head,
a program has one row.

    l_b = top_b - m + rest_b     m = max top_b     s = sum e^l_b     u = sum e^l_b (l_b - gap_b)

are the row's statistics without the target's column; results and the choice of active blocks
follow as in core/softmax.py and core/softmax.py. Rows beyond R (ignored ones) get zeros.

    tensor                                shape            dtype
    top, rest, gap, z_t                   [R, B], z_t [R]  fp32
    logprob entropy total peak log_sum    [N]              fp32; total = peak + log_sum
    bits, dense, pairs                    [B / 8, N], [N]  uint8, uint8, int32

A head that is a shard stops at m, s, u, z_t (STAGE 1) and goes on with those of all shards (2).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from riskpo_kernels.core.softmax import BLOCK, LogitMap
from riskpo_kernels.kernels import Configuration, configuration
from riskpo_kernels.kernels.head_forward import BlockStatistics
from riskpo_kernels.kernels.tl_math import row_results

WHOLE, TO_STATE, FROM_STATE = 0, 1, 2
LOG_BLOCK = tl.constexpr(4.852030263919617)  # log 128, in the bound of an entropy's gradient


@triton.jit
def active_blocks(
    lse, m_o, own, peak, log_sum, q, z_t, entropy, eps, cap, temperature, softcap, p_entropy,
    HALVINGS: tl.constexpr,
):  # fmt: skip
    # core/softmax.py's select, for blocks [BR, NB] of rows [BR]; own marks the target's
    eps = tl.full(peak.shape, 1.0, tl.float32) * eps
    if softcap is not None:
        high, at_t = peak * temperature / softcap, z_t * temperature / softcap
        eps *= tl.maximum(tl.minimum(1.0 - high * high, 1.0 - at_t * at_t), 0.0)
    theta = eps * tl.minimum(16.0 * tl.maximum(q, 1.52587890625e-05), 1.0)
    log_s = (lse - peak[:, None]) - log_sum[:, None]
    log_s = tl.minimum(log_s, 0.0, propagate_nan=tl.PropagateNan.ALL)
    mass = tl.exp(log_s)
    if p_entropy is not None:
        theta = theta / 2
        spread = (tl.abs(log_s + entropy[:, None]) + LOG_BLOCK) * mass
        spread = tl.where(mass > 0, spread, 0.0)
        mass = tl.maximum(mass, spread, propagate_nan=tl.PropagateNan.ALL)
    mass = tl.where(m_o, mass, 0.0)
    threshold = theta
    for _ in tl.static_range(HALVINGS):
        dropped = tl.sum(tl.where(mass >= threshold[:, None], 0.0, mass), 1)
        threshold = tl.where(dropped > cap * theta, threshold / 2, threshold)
    dropped = tl.sum(tl.where(mass >= threshold[:, None], 0.0, mass), 1)
    threshold = tl.where(dropped > cap * theta, 0.0, threshold)
    # a row with a NaN has no threshold to be below: it is kept whole, and the NaN stays visible
    below = mass < threshold[:, None]
    return m_o & ((below == 0) | own)


@triton.jit(
    do_not_specialize=["R", "n_rows", "first", "offset", "n", "stride_blocks"],
    do_not_specialize_on_alignment=["p_target", "p_temperature", "p_order", "p_zt"],
)
def finish_kernel(
    p_top, p_rest, p_gap, p_zt, p_target, p_temperature, p_order, p_state, p_logprob, p_entropy,
    p_total, p_peak, p_log_sum, p_bits, p_dense, p_pairs,
    R, n_rows, V, first, offset, n, stride_blocks, eps, cap, dense_above, softcap, temperature,
    STAGE: tl.constexpr, HALVINGS: tl.constexpr, BR: tl.constexpr, NB: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    live, m_r = r < R, r < n_rows
    i = first + r
    if p_order is not None:
        i = tl.load(p_order + i, mask=m_r, other=0)
    target = tl.load(p_target + i, mask=m_r, other=-1).to(tl.int64) - offset
    here = live & (target >= 0) & (target < V)
    o_b = tl.arange(0, NB)  # [NB]
    m_o = live[:, None] & (o_b * BLOCK < V)[None, :]
    at = r[:, None] * stride_blocks + o_b[None, :]
    top = tl.load(p_top + at, mask=m_o, other=float("-inf"))  # [BR, NB]
    rest = tl.load(p_rest + at, mask=m_o, other=0.0)

    if STAGE == 2:
        m = tl.load(p_state + r, mask=live, other=0.0)
        s = tl.load(p_state + R + r, mask=live, other=0.0)
        z_t = tl.load(p_state + 2 * R + r, mask=live, other=0.0)
        u = s
        if p_entropy is not None:
            u = tl.load(p_state + 3 * R + r, mask=live, other=0.0)
    else:
        z_t = tl.load(p_zt + r, mask=here, other=float("-inf"))
        m = tl.max(top, 1)
        anchor = tl.where(m == float("-inf"), 0.0, m)  # -inf - -inf is NaN
        below = (top - anchor[:, None]) + rest
        w = tl.exp(below)
        s = tl.sum(w, 1)
        u = s
        if p_entropy is not None:
            gap = tl.load(p_gap + at, mask=m_o, other=0.0)
            u = tl.sum(tl.where(w > 0, w * (below - gap), 0.0), 1)
    if STAGE == 1:
        tl.store(p_state + r, m, mask=live)
        tl.store(p_state + R + r, s, mask=live)
        tl.store(p_state + 2 * R + r, z_t, mask=live)
        if p_entropy is not None:
            tl.store(p_state + 3 * R + r, u, mask=live)
    else:
        logprob, entropy, peak, log_sum, q = row_results(m, m - z_t, s, u, z_t)
        tl.store(p_logprob + i, tl.where(live, logprob, 0.0), mask=m_r)
        tl.store(p_peak + i, tl.where(live, peak, 0.0), mask=m_r)
        tl.store(p_log_sum + i, tl.where(live, log_sum, 0.0), mask=m_r)
        tl.store(p_total + i, tl.where(live, peak + log_sum, 0.0), mask=m_r)
        if p_entropy is not None:
            tl.store(p_entropy + i, tl.where(live, entropy, 0.0), mask=m_r)
        if p_bits is not None:
            if p_temperature is not None:
                temperature = tl.load(p_temperature + i, mask=m_r, other=1.0)
            own = here[:, None] & (o_b[None, :] == (target // BLOCK)[:, None])
            keep = active_blocks(
                top + rest, m_o, own, peak, log_sum, q, z_t, entropy,
                eps, cap, temperature, softcap, p_entropy, HALVINGS,
            )  # fmt: skip
            flags = tl.where(keep, 1, 0)
            count = tl.sum(flags, 1)
            tl.store(p_pairs + i, count, mask=m_r)
            tl.store(p_dense + i, (count > dense_above).to(tl.uint8), mask=m_r)
            bit = tl.reshape(flags, (BR, NB // 8, 8)) << tl.arange(0, 8)[None, None, :]
            packed = tl.sum(bit, 2)  # [BR, NB / 8]
            o_8 = tl.arange(0, NB // 8)
            m_8 = m_r[:, None] & (o_8 * 8 * BLOCK < V)[None, :]
            at_8 = o_8.to(tl.int64)[None, :] * n + i[:, None]
            tl.store(p_bits + at_8, packed.to(tl.uint8), mask=m_8)


def launch_options(blocks: int) -> tuple[int, int, int]:
    """(BR, NB, warps) for rows of so many blocks: small heads' rows share a program."""
    size = max(8, triton.next_power_of_2(blocks))
    return max(1, min(32, 512 // size)), size, min(16, max(4, size // 512))


def finish(
    out: BlockStatistics,
    target: torch.Tensor,
    order: torch.Tensor | None,
    map: LogitMap,
    results: dict[str, torch.Tensor | None],
    *,
    rows: int,
    ignored: int,
    first: int,
    offset: int,
    vocab: int,
    eps: float,
    cap: float,
    halvings: int,
    dense_share: float,
    state: torch.Tensor | None = None,
    stage: int = WHOLE,
) -> None:
    """Write `results` (logprob, entropy, total, peak, log_sum, bits, dense, pairs; None where not
    wanted) of the rows of `out` [rows, B] and of `ignored` ones behind them. A row is dense with
    more active blocks than dense_share of all. state [4, rows]: m, s, z_t, u of a shard's rows."""
    blocks = out.top.shape[1]
    rows_each, size, warps = launch_options(blocks)
    per_row = map.temperature if isinstance(map.temperature, torch.Tensor) else None
    finish_kernel[(-(-(rows + ignored) // rows_each),)](
        p_top=out.top,
        p_rest=out.rest,
        p_gap=out.gap,
        p_zt=out.z_t,
        p_target=target,
        p_temperature=per_row,
        p_order=order,
        p_state=state,
        **{f"p_{name}": x for name, x in results.items()},
        R=rows,
        n_rows=rows + ignored,
        V=vocab,
        first=first,
        offset=offset,
        n=target.shape[0],
        stride_blocks=out.top.stride(0),
        eps=eps,
        cap=cap,
        dense_above=dense_share * blocks,
        softcap=map.softcap,
        temperature=1.0 if per_row is not None else map.temperature,
        STAGE=stage,
        HALVINGS=halvings,
        BR=rows_each,
        NB=size,
        BLOCK=BLOCK,
        num_warps=warps,
    )


def compile_configurations() -> list[Configuration]:
    """What can be launched: see kernels/__init__.py. Heads of 32,000 to 262,144 columns."""
    configurations = []
    for blocks, entropy, softcap in itertools.product((250, 1187, 2048), *((False, True),) * 2):
        for stage, select in ((WHOLE, True), (WHOLE, False), (TO_STATE, True), (FROM_STATE, True)):
            if blocks != 1187 and (stage or not select):
                continue
            rows, size, warps = launch_options(blocks)
            flags: dict[str, Any] = {"BR": rows, "NB": size}
            flags |= {"STAGE": stage, "HALVINGS": 6, "BLOCK": BLOCK}
            given = {"p_gap": entropy, "p_temperature": softcap, "softcap": softcap}
            given |= {"p_order": softcap, "p_state": stage != WHOLE, "p_entropy": entropy}
            given |= dict.fromkeys(("p_bits", "p_dense", "p_pairs"), select)
            types = {"p_target": "i64", "p_order": "i64", "p_bits": "u8", "p_dense": "u8"}
            types |= {"p_pairs": "i32"}
            name = f"finish NB={size} softcap={softcap:d} select={select:d} stage={stage}"
            name += f" entropy={entropy:d}"
            made = configuration(name, finish_kernel, types, given, flags, warps)
            configurations.append(made)
    return configurations

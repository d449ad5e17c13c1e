"""Which rows live, and whether their targets and temperatures are right, in one kernel.

    order     [N]  int64, the rows that are not ignored, in their order; then the ignored ones
    numbers   [5]  int64: targets outside the vocabulary, live rows, lowest and highest live target,
                   temperatures not above 0

One program goes through all rows: what it reads is 8 bytes a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from riskpo_kernels.core.checks import judge
from riskpo_kernels.kernels import Configuration, configuration

BN, WARPS = 2048, 8
FAR = tl.constexpr(2**62)


@triton.jit(
    do_not_specialize=["N", "V", "ignore_index"],
    do_not_specialize_on_alignment=["p_target", "p_temperature"],
)
def live_kernel(
    p_target, p_temperature, p_order, p_numbers,
    N, V, ignore_index,
    BN: tl.constexpr,
):  # fmt: skip
    bad = tl.full((BN,), 0, tl.int32)
    cold, low, high = bad, tl.full((BN,), FAR, tl.int64), tl.full((BN,), -FAR, tl.int64)
    n_live = 0
    for i in range(0, N, BN):
        o_n = i + tl.arange(0, BN)  # [BN]
        m_n = o_n < N
        target = tl.load(p_target + o_n, mask=m_n, other=0).to(tl.int64)
        live = m_n & (target != ignore_index)
        one = live.to(tl.int32)
        before = tl.cumsum(one, 0) - one  # live rows of this piece in front of each
        at = tl.where(live, n_live + before, N - 1 - (o_n - n_live - before))
        tl.store(p_order + at, o_n.to(tl.int64), mask=m_n)
        bad += (live & ((target < 0) | (target >= V))).to(tl.int32)
        low = tl.minimum(low, tl.where(live, target, FAR))
        high = tl.maximum(high, tl.where(live, target, -FAR))
        if p_temperature is not None:
            t = tl.load(p_temperature + o_n, mask=live, other=1.0)
            cold += (live & ((t > 0) == 0)).to(tl.int32)
        n_live += tl.sum(one, 0)
    tl.store(p_numbers, tl.sum(bad, 0).to(tl.int64))
    tl.store(p_numbers + 1, n_live)
    tl.store(p_numbers + 2, tl.min(low, 0))
    tl.store(p_numbers + 3, tl.max(high, 0))
    tl.store(p_numbers + 4, tl.sum(cold, 0).to(tl.int64))


def live_first(
    op: str,
    target: torch.Tensor,
    vocab: int,
    ignore_index: int | None,
    temperature: torch.Tensor | None,
) -> tuple[torch.Tensor | None, int]:
    """(order [N], live rows) of flat contiguous targets [N]; order is None where every row lives.
    Same checks, same one host synchronisation as core.inputs.live_rows."""
    n = target.shape[0]
    if n == 0 or ignore_index is None:
        return None, n
    order = torch.empty(n, dtype=torch.int64, device=target.device)
    numbers = torch.empty(5, dtype=torch.int64, device=target.device)
    live_kernel[(1,)](
        p_target=target,
        p_temperature=temperature,
        p_order=order,
        p_numbers=numbers,
        N=n,
        V=vocab,
        ignore_index=ignore_index,
        BN=BN,
        num_warps=WARPS,
    )
    n_live = judge(op, numbers.tolist(), vocab, ignore_index)
    return (None if n_live == n else order), n_live


def compile_configurations() -> list[Configuration]:
    """Everything that can be launched: see kernels/__init__.py."""
    types = {"p_target": "i64", "p_order": "i64", "p_numbers": "i64"}
    made = []
    for per_row in (False, True):
        name, given = f"live rows={per_row:d}", {"p_temperature": per_row}
        made.append(configuration(name, live_kernel, types, given, {"BN": BN}, WARPS))
    return made

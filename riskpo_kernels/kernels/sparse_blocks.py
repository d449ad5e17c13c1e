"""The backward of a head over its active (row, block) pairs, as three grouped products.

Pairs are listed block by block; a tile is up to BM pairs of one block b, the rows r_1 .. r_BM.

    1. z = H[r] W_b^T            gathered logits, recomputed        [BM, 128]
       dz = gradient of z        rounded once, stored               [BM, 128]
       its column sums           before the rounding, for dbias     [128]
    2. dH[r] += dz W_b           kernels/sparse_hidden.py
    3. dW_b = sum dz^T H[r]      over the tiles of b: kernels/sparse_weight.py

    tensor          shape          dtype
    hidden, weight  [N, D], [V, D] bf16, fp16 (fp32 in the interpreter: on a GPU it would spill)
    rows            [P]            int32, pairs sorted by block; starts [B + 1] where blocks begin
    tile_block      [T]            int64, block of each tile; B beyond the last tile
    dz              [T, BM, 128]   dtype of hidden

Cost: 6 x 128 D FLOPs per pair, beside 2 V D per row for the forward; dz takes 256 bytes a pair in
16 bits. riskpo_kernels/lm_head/sparse_triton.py makes the lists and launches.
"""

from __future__ import annotations

import itertools
from typing import Any

import triton
import triton.language as tl

from riskpo_kernels.core.softmax import BLOCK, FLOOR
from riskpo_kernels.kernels import Configuration, configuration
from riskpo_kernels.kernels.tl_math import logits_gradient, logits_of

# 128 gathered rows x 128 columns: 64 accumulator registers a thread at 8 warps leave room for the
# epilogue. BK is the depth of a step of product 1.
BM, BK, WARPS, STAGES = 128, 64, 8, 3
FEW_ROWS = 4096  # below it tiles of 128 are too empty: predicted by benchmarks/model.py
LOWEST = tl.constexpr(FLOOR)


def tile_rows(rows: int, softcap: bool, deterministic: bool) -> int:
    """Pairs of a tile, of so many rows in all: half as many where they would not fill it, but not
    where a row's bits may not hang on how many come with it. With a softcap's slopes beside the
    logits, 128 rows spill on sm_100."""
    return BM // 2 if softcap or (rows < FEW_ROWS and not deterministic) else BM


def register_limit(rows: int) -> int:
    """at_most of products 1 and 2: left alone, ptxas squeezes some into 128 registers or fewer, for
    a second block on the multiprocessor, and spills."""
    return 168 if rows < BM else 240


@triton.jit(do_not_specialize=["first_block", "n_blocks"])
def dz_kernel(
    p_hidden, p_weight, p_bias, p_index, p_rows, p_starts, p_tiles, p_tile_block, p_target,
    p_temperature, p_at_target, p_offset, p_slope, p_peak, p_log_sum, p_dz, p_sums,
    D, V, first_block, n_blocks, stride_h, stride_w, inner, outer,
    BM: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    i_b = tl.load(p_tile_block + i_t)  # counted from first_block
    if i_b >= n_blocks:
        return
    first = tl.load(p_starts + i_b) + (i_t - tl.load(p_tiles + i_b)) * BM
    o_p = first + tl.arange(0, BM)
    m_p = o_p < tl.load(p_starts + i_b + 1)
    o_v = (first_block + i_b) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_v = o_v < V

    r = tl.load(p_rows + o_p, mask=m_p, other=0).to(tl.int64)  # [BM]
    source = tl.load(p_index + r, mask=m_p, other=0)  # where the rows lie in hidden
    x = tl.full((BM, BLOCK), 0.0, tl.float32)
    for k in range(0, D, BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < D
        h = tl.load(
            p_hidden + source[:, None] * stride_h + o_k[None, :],
            mask=m_p[:, None] & m_k[None, :],
            other=0.0,
        )  # [BM, BK]
        w = tl.load(
            p_weight + o_v[None, :] * stride_w + o_k[:, None],
            mask=m_v[None, :] & m_k[:, None],
            other=0.0,
        )  # [BK, BLOCK]
        x = tl.dot(h, w, x, input_precision="ieee")
    if p_bias is not None:
        x += tl.load(p_bias + o_v, mask=m_v, other=0.0)[None, :]
    if p_temperature is not None:
        outer = outer / tl.load(p_temperature + r, mask=m_p, other=1.0)[:, None]
    z, cap_slope = logits_of(x, inner, outer)

    peak = tl.load(p_peak + r, mask=m_p, other=0.0)
    log_sum = tl.load(p_log_sum + r, mask=m_p, other=0.0)
    target = tl.load(p_target + r, mask=m_p, other=-1)
    at_target = tl.load(p_at_target + r, mask=m_p, other=0.0)
    offset = tl.load(p_offset + r, mask=m_p, other=0.0)
    slope = None
    if p_slope is not None:
        slope = tl.load(p_slope + r, mask=m_p, other=0.0)
    log_p = (z - peak[:, None]) - log_sum[:, None]
    taken = o_v[None, :] == target[:, None]
    dz = logits_gradient(log_p, taken, at_target, offset, slope, LOWEST)
    dz = tl.where(m_p[:, None] & m_v[None, :], dz * cap_slope, 0.0)

    o_dz = (i_t * BM + tl.arange(0, BM))[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(p_dz + o_dz, dz.to(p_dz.dtype.element_ty))
    if p_sums is not None:
        tl.store(p_sums + i_t * BLOCK + tl.arange(0, BLOCK), tl.sum(dz, 0))


def compile_configurations() -> list[Configuration]:
    """What can be launched, see kernels/__init__.py: each way to make a logit in bf16; the plainest
    and the fullest in fp16, and in half a tile without a softcap."""
    configurations = []
    for dtype in ("bf16", "fp16"):
        # dbias is wanted of a head with a bias only
        biases = ((False, False), (True, False), (True, True))
        others = itertools.product(*((False, True),) * 3, (BM, BM // 2))
        for (bias, db), (softcap, per_row, g, rows) in itertools.product(biases, others):
            if softcap and rows == BM:
                continue  # see tile_rows
            extreme = bias == db == per_row == g
            if not extreme and (dtype == "fp16" or (rows < BM and not softcap)):
                continue
            flags = {"BK": BK, "BM": rows}
            given = {"p_bias": bias, "p_temperature": per_row, "p_slope": g}
            given |= {"p_sums": db, "inner": softcap}
            name = f"dz-dot {dtype} bias={bias:d} softcap={softcap:d} rows={per_row:d} g={g:d} "
            name += f"db={db:d} BM={rows}"
            limit = register_limit(rows)
            configurations.append(
                sparse_configuration(name, dz_kernel, dtype, {}, given, flags, limit)
            )
    return configurations


def sparse_configuration(
    name: str,
    kernel: Any,
    dtype: str,
    types: dict[str, str],
    given: dict[str, bool],
    flags: dict[str, Any],
    limit: int | None = None,
) -> Configuration:
    """A launch of one of the products: of `types` beside those that all of them share."""
    shared = {"p_hidden": dtype, "p_weight": dtype, "p_dz": dtype, "p_rows": "i32"}
    places = ("index", "starts", "tiles", "tile_block", "target", "job_block", "first_job")
    shared |= {f"p_{x}": "i64" for x in (*places, "first_part", "order", "first_pair")}
    flags = flags | ({"BLOCK": BLOCK} if "BLOCK" in kernel.arg_names else {})
    options = {"maxnreg": limit} if limit else {}
    return configuration(name, kernel, shared | types, given, flags, WARPS, STAGES, **options)

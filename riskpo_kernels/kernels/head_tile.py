"""A tile of logits of a head, h W^T, as the forward and the dense backward multiply it.

Programs are persistent. Tiles are handed out in groups of GROUP row tiles, which then share columns
of the weight in the L2 cache. Loads go through tensor-map descriptors (TMA) where FORWARDS says so
and strides and addresses are multiples of 16 bytes, else through pointers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from riskpo_kernels.kernels import Configuration, at_most, capability_of, configuration

GROUP = 16


class Tile(NamedTuple):
    """One variant of the kernel: rows, columns and depth of a tile, how it is launched, whether it
    loads through TMA, where it is launched, as 10 x compute capability (empty: wherever no other
    is), and what bounds its registers: left alone, ptxas squeezes some into 128, for a second
    program on the multiprocessor that never comes, and spills."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    tma: bool
    archs: tuple[int, ...] = ()
    registers: int | None = None


# The launcher, the compile gate and the benchmarks read this table. A wider tile that spills on an
# architecture is not in it (docs/kernel-notes.md).
FORWARDS = {
    "hopper": Tile(128, 256, 64, 8, 4, True, (90,)),
    "blackwell": Tile(128, 128, 64, 8, 3, True, (100, 103)),
    "ampere": Tile(128, 128, 32, 8, 4, False, (80,)),
    "pointers": Tile(64, 128, 32, 8, 4, False, registers=168),
}


NARROW = {"hopper": "blackwell", "blackwell": "pointers"}  # for an epilogue that holds more


def forward_on(capability: tuple[int, int], tma: bool) -> str:
    """The row of FORWARDS that is launched."""
    arch = 10 * capability[0] + capability[1]
    return next((k for k, x in FORWARDS.items() if arch in x.archs and x.tma <= tma), "pointers")


@triton.jit
def tile_at(tile, n_r, n_v, GROUP: tl.constexpr, BN: tl.constexpr):
    # which row tile, and its first column: GROUP row tiles share columns, then come the next ones
    first = tile // (GROUP * n_v) * GROUP
    n_here = tl.minimum(n_r - first, GROUP)
    return first + tile % (GROUP * n_v) % n_here, tile % (GROUP * n_v) // n_here * BN


@triton.jit
def hits_of(target, m_r, v, BN: tl.constexpr, BLOCK: tl.constexpr):
    # how many rows have their target in the first block of columns from v on; 65536 of the second's
    block = tl.where(m_r & (target >= v) & (target < v + BN), (target - v) // BLOCK, 2)
    return tl.sum(tl.where(block == 0, 1, tl.where(block == 1, 65536, 0)), 0)


@triton.jit
def product(
    d_hidden, d_weight, p_hidden, p_weight,
    i_r, v, R, V, D, stride_h, stride_w,
    TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # h W^T of a tile [BM, BN]: row tile i_r, columns from v on
    x = tl.full((BM, BN), 0.0, tl.float32)
    for d in range(0, D, BK):
        if TMA:
            h = d_hidden.load([i_r * BM, d])  # [BM, BK]
            w = d_weight.load([v, d])  # [BN, BK]
        else:
            o_r = i_r.to(tl.int64) * BM + tl.arange(0, BM)
            o_d = d + tl.arange(0, BK)
            o_w = v.to(tl.int64) + tl.arange(0, BN)
            m_d = (o_d < D)[None, :]
            h_at = p_hidden + o_r[:, None] * stride_h + o_d[None, :]
            w_at = p_weight + o_w[:, None] * stride_w + o_d[None, :]
            h = tl.load(h_at, mask=(o_r < R)[:, None] & m_d, other=0.0)
            w = tl.load(w_at, mask=(o_w < V)[:, None] & m_d, other=0.0)
        x = tl.dot(h, tl.trans(w), x, input_precision="ieee")
    return x


def operands_of(
    hidden: torch.Tensor, weight: torch.Tensor, *, narrow: bool = False
) -> tuple[Tile, dict[str, Any]]:
    """The row of FORWARDS for a product of these, and what a launch says of them and of it.
    narrow: a smaller one, for an epilogue beside which it would spill."""
    can = _tma(hidden) and _tma(weight)
    name = forward_on(capability_of(hidden.device), can)
    tile = FORWARDS[NARROW.get(name, name) if narrow else name]
    d_hidden, d_weight = (
        TensorDescriptor.from_tensor(x, [n, tile.depth]) if tile.tma else None
        for x, n in ((hidden, tile.rows), (weight, tile.columns))
    )
    p_hidden, p_weight = (None, None) if tile.tma else (hidden, weight)
    given: dict[str, Any] = dict(d_hidden=d_hidden, d_weight=d_weight, D=hidden.shape[1])
    given |= dict(p_hidden=p_hidden, p_weight=p_weight)
    given |= dict(stride_h=hidden.stride(0), stride_w=weight.stride(0), TMA=tile.tma, GROUP=GROUP)
    given |= dict(BM=tile.rows, BN=tile.columns, BK=tile.depth)
    launch = dict(num_warps=tile.warps, num_stages=tile.stages) | at_most(tile.registers)
    return tile, given | launch


def _tma(x: torch.Tensor) -> bool:
    """Whether x [n, D] can be read through a tensor map; rows of an expanded tensor cannot."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    aligned = aligned and x.stride(0) >= x.shape[1]
    return aligned and x.stride(1) == 1 and x.numel() > 0 and capability_of(x.device) >= (9, 0)


def tile_configuration(
    kind: str,
    title: str,
    kernel: Any,
    dtype: str,
    variant: str,
    types: dict[str, str],
    given: dict[str, bool],
    flags: dict[str, Any],
    *,
    narrow: bool = False,
) -> Configuration:
    """A launch of a kernel that multiplies tiles, where a row of FORWARDS is launched."""
    archs = FORWARDS[variant].archs
    variant = NARROW.get(variant, variant) if narrow else variant
    tile = FORWARDS[variant]
    flags = flags | {"TMA": tile.tma, "GROUP": GROUP}
    flags |= {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth}
    types = types | {"p_hidden": dtype, "p_weight": dtype}
    types |= {"d_hidden": f"tensordesc<{dtype}[{tile.rows},{tile.depth}]>"}
    types |= {"d_weight": f"tensordesc<{dtype}[{tile.columns},{tile.depth}]>"}
    given = given | dict.fromkeys(("d_hidden", "d_weight"), tile.tma)
    given |= dict.fromkeys(("p_hidden", "p_weight"), not tile.tma)
    name = f"{kind}-{variant}-dot{'-tma' if tile.tma else ''} {dtype} {title}"
    options = {} if tile.registers is None else {"maxnreg": tile.registers}
    made = configuration(name, kernel, types, given, flags, tile.warps, tile.stages, **options)
    return made._replace(archs=archs)

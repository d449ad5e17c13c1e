"""How big the tiles are, how they are multiplied, and how much is multiplied.

The tiled ops work on one [rows, cols] tile of logits at a time. `plan_tiles` turns the caller's
memory_mib into that tile; `Products` multiplies with float32 accumulation on every device.
`counting` counts the multiply-adds of a head, padding included, for the benchmarks:

    with counting() as work:
        linear_logprob(...).logprob.sum().backward()
    units = 2 * work.multiply_adds / (N * D * V)    # one dense product of the head is 2 units
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from riskpo_kernels.core.checks import SIXTEEN_BIT, reject

MIN_ROWS, MIN_COLS = 16, 128


@dataclass(frozen=True)
class Plan:
    """Rows and vocabulary columns of one tile."""

    rows: int
    cols: int


def plan_tiles(
    op: str,
    n_rows: int,
    vocab: int,
    width: int,
    *,
    memory_mib: float,
    most_rows: int,
    most_cols: int,
    tile_bytes: int,
    edge_bytes: int | tuple[int, int],
    row_bytes: int = 0,
) -> Plan:
    """The largest tile that fits: tile_bytes per element of the tile, edge_bytes per element of
    the [rows, width] and [cols, width] pieces that are live beside it (of each, if they differ),
    row_bytes per row."""
    budget = int(memory_mib * 2**20)
    row_edge, col_edge = (edge_bytes,) * 2 if isinstance(edge_bytes, int) else edge_bytes
    rows, cols = min(most_rows, max(n_rows, 1)), min(most_cols, max(vocab, 1))

    def cost(r: int, c: int) -> int:
        return tile_bytes * r * c + width * (row_edge * r + col_edge * c) + row_bytes * r

    while cost(rows, cols) > budget:
        if rows <= MIN_ROWS and cols <= MIN_COLS:
            need = -(-cost(rows, cols) // 2**20)
            reject(
                op,
                f"memory_mib={memory_mib}",
                f"at least {need} for one {rows} x {cols} tile at width {width}",
                "Raise memory_mib.",
            )
        # halve the longer side: products are fastest when neither side is thin; of equal ones that
        # which more is live beside
        longer = rows > cols or (rows == cols and row_edge >= col_edge)
        if rows > MIN_ROWS and (longer or cols <= MIN_COLS):
            rows = max(MIN_ROWS, -(-rows // 2))
        else:
            # whole blocks of MIN_COLS columns: a block belongs to one tile
            cols = MIN_COLS * max(1, -(-cols // (2 * MIN_COLS)))
    return Plan(rows, cols)


def spans(total: int, size: int) -> Iterator[slice]:
    """[0, total) cut into slices of `size`."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


@dataclass
class Work:
    """Multiply-adds of matrix products since the counter was opened."""

    multiply_adds: int = 0


_open: list[Work] = []  # not a context variable: autograd runs the backward in threads of its own


@contextlib.contextmanager
def counting() -> Iterator[Work]:
    """Counts the products of every head of this process, whichever thread runs them."""
    work = Work()
    _open.append(work)
    try:
        yield work
    finally:
        _open[:] = [x for x in _open if x is not work]  # equal is not same


def executed(*sizes: int) -> None:
    """One product of these sizes was launched."""
    if _open:
        total = 1
        for size in sizes:
            total *= size
        for work in _open:
            work.multiply_adds += total


class Products:
    """Matrix products of one op: 16-bit operands on a tensor core, float32 everywhere else.

    `dtype` is what operands are cast to before they enter a product: the 16-bit input type where
    the device multiplies it with a float32 result (CUDA, compute capability 8.0), else float32
    (float64 for float64 inputs). Results are always float32 (float64).
    """

    def __init__(self, device: torch.device, hidden: torch.dtype, weight: torch.dtype):
        common = torch.promote_types(hidden, weight)
        tensor_core = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        self.mixed = common in SIXTEEN_BIT and tensor_core
        self.wide = torch.promote_types(common, torch.float32)
        self.dtype = common if self.mixed else self.wide

    def into(self, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """out = a @ b"""
        executed(*a.shape, b.shape[1])
        if self.mixed:
            return torch.mm(a, b, out_dtype=self.wide, out=out)  # type: ignore[call-overload]
        return torch.mm(a, b, out=out)

    def add(
        self, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, apart: bool = False
    ) -> None:
        """out += a @ b; rows of a beyond those of out are padding. apart: the product is rounded
        before it is added whether or not there is padding: the bits do not tell."""
        executed(*a.shape, b.shape[1])
        wide = {"out_dtype": self.wide} if self.mixed else {}
        if apart or a.shape[0] > out.shape[0]:
            out.add_(torch.mm(a, b, **wide)[: out.shape[0]])  # type: ignore[call-overload]
        else:
            torch.addmm(out, a, b, **wide, out=out)  # type: ignore[call-overload]


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast off, on a device that has it."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 nor sums in fp16 may touch the products inside: an op's precision
    is its own."""
    with no_autocast(device):
        if device.type != "cuda":
            yield
            return
        # not allow_tf32: reading that raises once anyone has used fp32_precision
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision, matmul.allow_fp16_accumulation
        matmul.fp32_precision, matmul.allow_fp16_accumulation = "ieee", False
        try:
            yield
        finally:
            matmul.fp32_precision, matmul.allow_fp16_accumulation = before

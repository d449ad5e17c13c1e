"""The tile loops of a language-model head: forward into softmax statistics, backward into dH, dW.

Tiles of [rows, cols] logits fit in memory_mib. The forward folds each tile into a few float32
numbers per row; the backward recomputes a tile, turns it into the gradient of its logits and
multiplies that into dH and dW.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from riskpo_kernels import softmax_rows
from riskpo_kernels.chunks import Plan, Products, plan_tiles, spans
from riskpo_kernels.softmax_rows import LogitMap, RowState, RowStats

# (rows, cols) of the largest tile. CUDA forward: 32 MiB of fp32 logits stay in the L2 cache between
# the product and the fold. CUDA backward: wide tiles, so that dH and dW are touched rarely.
FORWARD_TILE = {"cuda": (8192, 1024), "cpu": (2048, 2048)}
BACKWARD_TILE = {"cuda": (8192, 8192), "cpu": (2048, 2048)}


@dataclass(frozen=True)
class Options:
    """Everything that is not a tensor."""

    scale: float
    softcap: float | None
    temperature: float
    entropy: bool
    backend: str
    memory_mib: float


def tile_functions(backend: str) -> ModuleType:
    """The module whose `fold` and `gradient` work on a tile."""
    if backend == "torch":
        return softmax_rows
    from riskpo_kernels.kernels import softmax_rows as triton_rows  # needs Triton: only on demand

    return triton_rows


class _Accumulator:
    """A gradient summed in float32 and rounded once. The axis of the outer loop is summed piece by
    piece; the other one needs a whole buffer, unless the gradient is that wide itself."""

    def __init__(
        self, like: torch.Tensor, index: torch.Tensor | None, n: int, whole: bool, wide: torch.dtype
    ):
        self.grad = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        self.index = index
        self.unit: torch.Tensor | None = None  # see _unit
        self.direct = like.dtype == wide and index is None
        shape = (n, like.shape[1])
        self.buffer = (
            torch.zeros(shape, dtype=wide, device=like.device)
            if whole and not self.direct
            else None
        )
        self.wide = wide

    def open(self, s: slice) -> torch.Tensor:
        """The accumulator of rows s."""
        if self.direct:
            return self.grad[s]
        if self.buffer is not None:
            return self.buffer[s]
        shape = (s.stop - s.start, self.grad.shape[1])
        return torch.zeros(shape, dtype=self.wide, device=self.grad.device)

    def close(self, s: slice, piece: torch.Tensor) -> None:
        """Rows s are complete."""
        if self.direct:
            return
        if self.unit is not None:
            piece = piece * self.unit
        if self.index is None:
            self.grad[s] = piece.to(self.grad.dtype)
        else:
            self.grad.index_copy_(0, self.index[s], piece.to(self.grad.dtype))

    def finish(self, step: int) -> torch.Tensor:
        if self.buffer is not None:
            for s in spans(self.buffer.shape[0], step):
                self.close(s, self.buffer[s])
        return self.grad


def _take(x: torch.Tensor, rows: torch.Tensor | None, s: slice, dtype: torch.dtype) -> torch.Tensor:
    """Rows s of the live rows of x."""
    return (x[s] if rows is None else x[rows[s]]).to(dtype)


def _plan(
    o: Options, hidden: torch.Tensor, weight: torch.Tensor, n: int, products: Products, back: bool
) -> Plan:
    device = "cuda" if hidden.device.type == "cuda" else "cpu"
    rows, cols = (BACKWARD_TILE if back else FORWARD_TILE)[device]
    wide = products.wide.itemsize
    tiles = 1  # the logits; further tiles are temporaries of the torch formulas
    if o.backend == "torch":
        tiles += int(o.entropy) + int(back and o.softcap is not None)
    return plan_tiles(
        "linear_logprob",
        n,
        weight.shape[0],
        hidden.shape[1],
        memory_mib=o.memory_mib,
        most_rows=rows,
        most_cols=cols,
        tile_bytes=tiles * wide + (2 if products.mixed and back else 0),
        edge_bytes=(3 if back else 1) * wide,
    )


def forward_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    rows: torch.Tensor | None,
    map: LogitMap,
    o: Options,
) -> RowState:
    """The softmax state of the live rows over these columns; target [n] counts from column 0."""
    n, vocab = target.numel(), weight.shape[0]
    products = Products(hidden.device, hidden.dtype, weight.dtype)
    plan = _plan(o, hidden, weight, n, products, back=False)
    state = RowState.new(n, o.entropy, hidden, products.wide)
    tile = torch.empty(plan.rows * plan.cols, dtype=products.wide, device=hidden.device)
    fold = tile_functions(o.backend).fold
    for r in spans(n, plan.rows):
        h = _take(hidden, rows, r, products.dtype)
        for c in spans(vocab, plan.cols):
            raw = tile[: h.shape[0] * (c.stop - c.start)].view(h.shape[0], -1)
            products.into(raw, h, weight[c].to(products.dtype).T)
            b = None if bias is None else bias[c].to(products.wide)
            fold(raw, target[r] - c.start, b, state.of(r), map.of(r))
    return state


def _unit(
    c: torch.Tensor | None, g: torch.Tensor | None, products: Products
) -> torch.Tensor | None:
    """Coefficients of a mean over many tokens vanish in fp16's range: they are divided by their
    largest before they are rounded, and the sums are multiplied by it."""
    if not products.mixed or products.dtype != torch.float16:
        return None
    parts = [x.abs().amax() for x in (c, g) if x is not None]
    return torch.stack(parts).amax().clamp(min=torch.finfo(torch.float32).tiny)


def backward_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    rows: torch.Tensor | None,
    stats: RowStats,
    c: torch.Tensor | None,
    g: torch.Tensor | None,
    map: LogitMap,
    needs: tuple[bool, bool, bool],
    o: Options,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dH, dW, dbias of the given rows, every column of every row (the dense backward).

    This is the seam for a sparse one: same arguments, same results.
    """
    n, vocab = target.numel(), weight.shape[0]
    products = Products(hidden.device, hidden.dtype, weight.dtype)
    plan = _plan(o, hidden, weight, n, products, back=True)
    gradient = tile_functions(o.backend).gradient
    # the whole float32 buffer belongs to the axis of the inner loop: let that be the smaller one
    rows_outer = not needs[1] or (needs[0] and vocab <= n)
    dh = _Accumulator(hidden, rows, n, not rows_outer, products.wide) if needs[0] else None
    dw = _Accumulator(weight, None, vocab, rows_outer, products.wide) if needs[1] else None
    db = torch.zeros(vocab, dtype=products.wide, device=hidden.device) if needs[2] else None
    unit = _unit(c, g, products)
    if unit is not None:
        c, g = (None if x is None else x / unit for x in (c, g))
        for acc in (dh, dw):
            if acc is not None:
                acc.unit = unit
    tile = torch.empty(plan.rows * plan.cols, dtype=products.wide, device=hidden.device)
    small = torch.empty_like(tile, dtype=products.dtype) if products.mixed else tile

    def one_tile(
        r: slice, v: slice, dh_piece: torch.Tensor | None, dw_piece: torch.Tensor | None
    ) -> None:
        h, w = _take(hidden, rows, r, products.dtype), weight[v].to(products.dtype)
        size = h.shape[0] * w.shape[0]
        raw, dz = (x[:size].view(h.shape[0], -1) for x in (tile, small))
        products.into(raw, h, w.T)
        b = None if bias is None else bias[v].to(products.wide)
        cg = (None if x is None else x[r] for x in (c, g))
        gradient(raw, target[r] - v.start, b, stats.of(r), *cg, map.of(r), dz)
        if dh_piece is not None:
            products.add(dh_piece, dz, w)
        if dw_piece is not None:
            products.add(dw_piece, dz.T, h)
        if db is not None:
            db[v] += dz.sum(0, dtype=products.wide)

    outer, inner = (dh, dw) if rows_outer else (dw, dh)
    sizes = (n, plan.rows), (vocab, plan.cols)
    for a in spans(*sizes[0 if rows_outer else 1]):
        piece = None if outer is None else outer.open(a)
        for i in spans(*sizes[1 if rows_outer else 0]):
            other = None if inner is None else inner.open(i)
            if rows_outer:
                one_tile(a, i, piece, other)
            else:
                one_tile(i, a, other, piece)
        if outer is not None and piece is not None:
            outer.close(a, piece)
    if db is not None and unit is not None:
        db *= unit
    return (
        None if dh is None else dh.finish(plan.rows),
        None if dw is None else dw.finish(plan.cols),
        None if db is None or bias is None else db.to(bias.dtype),
    )

"""The product of hidden states with a head, tile by tile: its operands, its tiles, its precision.

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
from dataclasses import dataclass, replace

import torch

from riskpo_kernels.core.checks import SIXTEEN_BIT, choose, reject
from riskpo_kernels.core.column_order import ColumnOrder
from riskpo_kernels.core.low_rank import LowRank
from riskpo_kernels.core.process_groups import NO_GROUP
from riskpo_kernels.core.softmax import LogitMap, n_blocks

MIN_ROWS, MIN_COLS = 16, 128
# (rows, cols) of the largest tile. On CUDA wide tiles, so that dH and dW are touched rarely; the
# forward's are those of PyTorch's road, which float32 products take there.
FORWARD_TILE = {"cuda": (4096, 8192), "cpu": (2048, 2048)}
BACKWARD_TILE = {"cuda": (8192, 8192), "cpu": (2048, 2048)}
# With deterministic=True every product has this many rows, some of them padding, and columns that
# do not depend on the batch: the bits of a product's row depend on the product's shape.
WHOLE_TILE = {"cuda": (128, 65_536), "cpu": (128, 2048)}


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


def padded(x: torch.Tensor, rows: int, value: float = 0.0) -> torch.Tensor:
    """x with rows of `value` below it, `rows` in all; without rows to reach x itself, else always a
    copy: a product's bits may depend on how its operands lie in memory."""
    if not rows:
        return x
    out = x.new_full((max(rows, x.shape[0]), *x.shape[1:]), value)
    out[: x.shape[0]] = x
    return out


def put_among(keep: torch.Tensor | None, n: int, x: torch.Tensor) -> torch.Tensor:
    """Live rows' numbers (along the last dimension) among all n rows; zero elsewhere."""
    return x if keep is None else x.new_zeros(*x.shape[:-1], n).index_copy(-1, keep, x)


def wide_of(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """What their products are summed in."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


@dataclass(frozen=True)
class Options:
    """Everything that is not a tensor in a call of linear_logprob."""

    scale: float
    softcap: float | None
    temperature: float
    return_entropy: bool
    backend: str
    memory_mib: float
    tail_eps: float
    deterministic: bool
    keep: bool  # a backward may follow
    ignore_index: int | None = None
    group: str = NO_GROUP
    factor: float = 1.0  # of an adapter
    raises: bool = True  # where a target is outside its row's support

    def resolved(self, hidden: torch.Tensor, weight: torch.Tensor, tiled: bool = True) -> Options:
        """With the backend that runs."""
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        backend = choose("linear_logprob", self.backend, hidden.device, dtype)
        if tiled and hidden.device.type == "cuda" and dtype == torch.float32:
            backend = "torch"  # the kernels' tiles would spill in float32; cuBLAS's do not
        return replace(self, backend=backend)

    def map(self, row_temperature: torch.Tensor | None, wide: torch.dtype) -> LogitMap:
        if row_temperature is None:
            return LogitMap(self.scale, self.softcap, self.temperature)
        return LogitMap(self.scale, self.softcap, row_temperature.to(wide).contiguous())


@dataclass(frozen=True)
class Head:
    """hidden [N, D], weight [V, D], bias [V]; n of the rows, by index (None: all), with targets.
    low_rank: columns beside them; then no gradient is taken of the weight's own. kept: raw logits
    of the first columns of all of hidden, which the backward need not compute again. order: which
    of the vocabulary each column is, targets too (None: as in the weight)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    rows: torch.Tensor | None
    target: torch.Tensor
    map: LogitMap
    kept: torch.Tensor | None = None  # [N, K]: the forward writes it, the backward reads it
    low_rank: LowRank | None = None
    order: ColumnOrder | None = None

    @property
    def n(self) -> int:
        return self.target.numel()

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        return self.hidden.shape[1] + (0 if self.low_rank is None else self.low_rank.width)

    def columns(self, v: slice, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the head; with an order they stand where the next call writes."""
        w = self.weight[v] if self.order is None else self.order.take(self.weight, v)
        w, low, ids = w.to(dtype), self.low_rank, self.ids(v)
        return w if low is None else torch.cat((w, low.beside_weight(ids)), 1)

    def ids(self, v: slice) -> slice | torch.Tensor:
        """Which of the vocabulary columns v are."""
        return v if self.order is None else self.order.ids[v]

    def trained(self, h: torch.Tensor) -> torch.Tensor:
        """What a gradient of logits is multiplied with to give that of the weight."""
        return h if self.low_rank is None else h[:, h.shape[1] - self.low_rank.width :]

    def of(self, keep: torch.Tensor) -> Head:
        """Some of the rows."""
        rows = keep if self.rows is None else self.rows[keep]
        return replace(self, rows=rows, target=self.target[keep], map=self.map.of(keep))

    def take(self, s: slice | torch.Tensor, dtype: torch.dtype, pad: int = 0) -> torch.Tensor:
        """Hidden states of rows s, and rows of zeros up to `pad`."""
        h, low = self.hidden[self.at(s)].to(dtype), self.low_rank
        return padded(h if low is None else torch.cat((h, low.beside_hidden(self.at(s))), 1), pad)

    def targets(self, s: slice | torch.Tensor, v: slice, pad: int = 0) -> torch.Tensor:
        """Targets of rows s, counted from the first of columns v."""
        return padded(self.target[s], pad) - v.start

    def map_of(self, s: slice | torch.Tensor, pad: int = 0) -> LogitMap:
        map = self.map.of(s)
        if isinstance(map.temperature, torch.Tensor):
            return map._replace(temperature=padded(map.temperature, pad, 1.0))
        return map

    def at(self, s: slice | torch.Tensor) -> slice | torch.Tensor:
        """Where rows s lie in hidden."""
        return s if self.rows is None else self.rows[s]

    def known(self, v: slice) -> int:
        """Of how many of the columns v, from the first on, logits are kept."""
        most = 0 if self.kept is None else self.kept.shape[1]
        return min(max(most - v.start, 0), v.stop - v.start)

    def keep(self, s: slice, v: slice, raw: torch.Tensor) -> None:
        """Keep what fits of a tile."""
        known = self.known(v)
        if self.kept is not None and known:
            self.kept[self.at(s), v.start : v.start + known] = raw[:, :known]

    def logits(
        self,
        products: Products,
        s: slice | torch.Tensor,
        v: slice,
        h: torch.Tensor,
        w: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Raw logits of rows s and columns v into `out`: h @ w.T, unless they were kept."""
        known, at = self.known(v), self.at(s)
        if self.kept is not None and known:
            columns = self.kept[:, v.start : v.start + known]
            if isinstance(at, slice):
                out[:, :known] = columns[at]
            else:
                torch.index_select(columns, 0, at, out=out[:, :known])
        if known < w.shape[0]:
            products.into(out[:, known:], h, w[known:].T)

    def bias_of(self, v: slice, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.bias is None else self.bias[self.ids(v)].to(dtype)


def products_of(head: Head) -> Products:
    return Products(head.hidden.device, head.hidden.dtype, head.weight.dtype)


def plan_for(
    head: Head, o: Options, products: Products, vocab: int, edges: tuple[int, int] | None = None
) -> Plan:
    """The tile that memory_mib allows, for `vocab` columns. edges: in a backward, bytes live beside
    it for every number of its rows' hidden states and of its columns' head."""
    back = edges is not None
    device = "cuda" if head.hidden.device.type == "cuda" else "cpu"
    rows, cols = (BACKWARD_TILE if back else FORWARD_TILE)[device]
    if o.deterministic:
        rows, cols = WHOLE_TILE[device]
    wide = products.wide.itemsize
    return plan_tiles(
        "linear_logprob",
        rows if o.deterministic else head.n,
        vocab,
        head.width,
        memory_mib=o.memory_mib - (0 if head.kept is None else head.kept.nbytes / 2**20),
        most_rows=rows,
        most_cols=cols,
        tile_bytes=bytes_of_logit(o, products, back),
        edge_bytes=edges or wide,
        row_bytes=0 if back or not o.tail_eps else (4 + o.return_entropy) * wide * n_blocks(vocab),
    )


def bytes_of_logit(o: Options, products: Products, back: bool) -> int:
    """Of a tile: Triton makes dz at once; further tiles are temporaries of the torch formulas."""
    if o.backend == "triton":
        return products.dtype.itemsize
    tiles = 1 + int(o.return_entropy) + int(back and o.softcap is not None)
    return products.wide.itemsize * tiles + (2 if products.mixed and back else 0)

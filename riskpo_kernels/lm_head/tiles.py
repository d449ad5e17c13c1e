"""The tile loops of a language-model head: forward into softmax statistics, backward into dH, dW.

Tiles of [rows, cols] logits fit in memory_mib. The forward folds each tile into a few float32
numbers per row; the dense backward recomputes a tile, turns it into the gradient of its logits and
multiplies that into dH and dW. lm_head/sparse_torch.py has the backward that visits active blocks
only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from riskpo_kernels.core import softmax
from riskpo_kernels.core.matmul import Plan, Products, plan_tiles, spans
from riskpo_kernels.core.softmax import BLOCK, KeptLogits, LogitMap, RowGradient, RowState, finish
from riskpo_kernels.lm_head.block_filter import CAP, ActiveBlocks, n_blocks, row_eps, select
from riskpo_kernels.lm_head.low_rank import LowRank
from riskpo_kernels.lm_head.vocab_parallel import VocabShard

# (rows, cols) of the largest tile. On CUDA wide tiles, so that dH and dW are touched rarely; the
# forward's are those of PyTorch's road, which float32 products take there.
FORWARD_TILE = {"cuda": (4096, 8192), "cpu": (2048, 2048)}
BACKWARD_TILE = {"cuda": (8192, 8192), "cpu": (2048, 2048)}
# With deterministic=True every product has this many rows, some of them padding, and columns that
# do not depend on the batch: the bits of a product's row depend on the product's shape.
WHOLE_TILE = {"cuda": (128, 65_536), "cpu": (128, 2048)}


def padded(x: torch.Tensor, rows: int, value: float = 0.0) -> torch.Tensor:
    """x with rows of `value` below it, `rows` in all; without rows to reach x itself, else always a
    copy: a product's bits may depend on how its operands lie in memory."""
    if not rows:
        return x
    out = x.new_full((max(rows, x.shape[0]), *x.shape[1:]), value)
    out[: x.shape[0]] = x
    return out


def rows_of(up: RowGradient, rows: slice | torch.Tensor, pad: int) -> RowGradient:
    """Some of the rows, and rows without a gradient up to `pad`."""
    return RowGradient(*(None if x is None else padded(x, pad) for x in up.of(rows)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Options:
    """Everything that is not a tensor."""

    scale: float
    softcap: float | None
    temperature: float
    return_entropy: bool
    backend: str
    memory_mib: float
    tail_eps: float
    deterministic: bool
    keep: bool  # a backward may follow


@dataclass(frozen=True)
class Head:
    """hidden [N, D], weight [V, D], bias [V]; n of the rows, by index (None: all), with targets.
    low_rank: columns beside them; then no gradient is taken of the weight's own."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    rows: torch.Tensor | None
    target: torch.Tensor
    map: LogitMap
    kept: KeptLogits | None = None  # the forward writes it, the backward reads it
    low_rank: LowRank | None = None

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
        w = self.weight[v].to(dtype)
        return w if self.low_rank is None else torch.cat((w, self.low_rank.beside_weight(v)), 1)

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
        known = 0 if self.kept is None else self.kept.load(self.at(s), v, out)
        if known < w.shape[0]:
            products.into(out[:, known:], h, w[known:].T)

    def bias_of(self, v: slice, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.bias is None else self.bias[v].to(dtype)


class Accumulator:
    """The gradient of an [n, D] tensor, summed piece by piece.

    A piece is opened, added to, and closed. With `whole` pieces may be opened again: the sums live
    in a float32 buffer until `finish`. Without it a piece is rounded when it is closed. Where the
    gradient itself is as wide as the sums, there is no buffer at all.
    """

    def __init__(
        self,
        like: torch.Tensor,
        wide: torch.dtype,
        *,
        whole: bool,
        index: torch.Tensor | None = None,
        grad: torch.Tensor | None = None,
    ):
        """index: pieces count in rows of `index`, which says where they lie in the gradient.
        grad: the gradient to write to, when several accumulators share it."""
        if grad is None:
            grad = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        self.grad, self.index, self.wide = grad, index, wide
        self.direct = grad.dtype == wide and index is None
        self.unit: torch.Tensor | None = None  # multiplies the sums before they are rounded
        self.buffer: torch.Tensor | None = None
        if whole and not self.direct:
            n = like.shape[0] if index is None else index.numel()
            self.buffer = torch.zeros(n, like.shape[1], dtype=wide, device=like.device)

    def open(self, s: slice) -> torch.Tensor:
        """The sums of rows s, to be added to in place."""
        if self.direct:
            return self.grad[s]
        if self.buffer is not None:
            return self.buffer[s]
        shape = (s.stop - s.start, self.grad.shape[1])
        return torch.zeros(shape, dtype=self.wide, device=self.grad.device)

    def close(self, s: slice, piece: torch.Tensor) -> None:
        """Rows s are complete; nothing to do where the sums stay open until `finish`."""
        if not self.direct and self.buffer is None:
            self._round(s, piece)

    def _round(self, s: slice, piece: torch.Tensor) -> None:
        rounded = (piece if self.unit is None else piece * self.unit).to(self.grad.dtype)
        if self.index is None:
            self.grad[s] = rounded
        else:
            self.grad.index_copy_(0, self.index[s], rounded)

    def finish(self, step: int) -> torch.Tensor:
        """The gradient."""
        if self.buffer is not None:
            for s in spans(self.buffer.shape[0], step):
                self._round(s, self.buffer[s])
        elif self.direct and self.unit is not None:
            self.grad *= self.unit
        return self.grad


@dataclass
class Gradients:
    """Accumulators of dH, dW and dbias; None where no gradient is required."""

    dh: Accumulator | None
    dw: Accumulator | None
    db: torch.Tensor | None


# (hidden states of rows, which rows, their state, their blocks' log-sum-exps or None)
Fold = Callable[[torch.Tensor, slice, RowState, torch.Tensor | None], None]


def products_of(head: Head) -> Products:
    return Products(head.hidden.device, head.hidden.dtype, head.weight.dtype)


def plan_for(
    head: Head, o: Options, products: Products, vocab: int, *, outer: int | None = None
) -> Plan:
    """The tile that memory_mib allows, for `vocab` columns. outer: in a backward, the axis whose
    sums are opened and closed piece by piece (0: rows)."""
    back = outer is not None
    device = "cuda" if head.hidden.device.type == "cuda" else "cpu"
    rows, cols = (BACKWARD_TILE if back else FORWARD_TILE)[device]
    if o.deterministic:
        rows, cols = WHOLE_TILE[device]
    wide = products.wide.itemsize
    edges = [3 * wide if back else wide] * 2
    if outer is not None and products.mixed and not o.deterministic:
        # of that axis the sums and what they are rounded to; of the other a 16-bit copy at most
        edges[outer] = 8 if products.dtype == torch.bfloat16 else 12
        edges[1 - outer] = 2
    # the logits; further tiles are temporaries of the torch formulas; Triton makes dz at once
    tile = wide * (1 + int(o.return_entropy) + int(back and o.softcap is not None))
    if o.backend == "triton":
        tile = products.dtype.itemsize
    return plan_tiles(
        "linear_logprob",
        rows if o.deterministic else head.n,
        vocab,
        head.width,
        memory_mib=o.memory_mib - (0 if head.kept is None else head.kept.raw.nbytes / 2**20),
        most_rows=rows,
        most_cols=cols,
        tile_bytes=tile + (2 if products.mixed and back and o.backend == "torch" else 0),
        edge_bytes=(edges[0], edges[1]),
        row_bytes=0 if back or not o.tail_eps else (4 + o.return_entropy) * wide * n_blocks(vocab),
    )


def forward_rows(
    head: Head, o: Options, shard: VocabShard | None = None
) -> tuple[RowState, ActiveBlocks | None]:
    """The softmax state of the rows and, unless tail_eps is 0, which blocks are active. The columns
    may be one shard of the vocabulary; the state is always that of all of it."""
    products = products_of(head)
    cap = CAP / shard.ranks if shard else CAP
    state = RowState.new(head.n, o.return_entropy, head.hidden, products.wide)
    active = None
    if o.tail_eps and head.vocab:
        active = ActiveBlocks.new(head.vocab, head.n, head.hidden.device)
    size, pad, fold = _fold_tiles(head, o, products, shard.widest if shard else head.vocab)
    for r in spans(head.n, size):
        h, part = head.take(r, products.dtype, pad), state.of(r)
        if h.shape[0] > part.m.numel():
            part = RowState.new(h.shape[0], o.return_entropy, head.hidden, products.wide)
        n_here = n_blocks(head.vocab) if active is not None else 0
        blocks = h.new_empty(h.shape[0], n_here, dtype=products.wide)
        fold(h, r, part, blocks if n_here else None)
        if shard is not None:
            shard.merge(part)
        if active is not None:
            target = padded(head.target[r], h.shape[0])
            stats = finish(part)
            eps = row_eps(o.tail_eps, stats, head.map_of(r, h.shape[0]))
            keep = select(blocks, target, stats, eps, o.return_entropy, cap)
            active.record(r, keep[: r.stop - r.start], by_row=o.deterministic)
        state.put(r, part)
    return state, active


def _fold_tiles(head: Head, o: Options, products: Products, vocab: int) -> tuple[int, int, Fold]:
    """Rows of a chunk, rows to pad it to, and what folds its hidden states h of rows r into their
    state `part`."""
    plan = plan_for(head, o, products, vocab)
    tile = torch.empty(plan.rows * plan.cols, dtype=products.wide, device=head.hidden.device)

    def tiles(h: torch.Tensor, r: slice, part: RowState, blocks: torch.Tensor | None) -> None:
        map = head.map_of(r, h.shape[0])
        for v in spans(head.vocab, plan.cols):
            raw = tile[: h.shape[0] * (v.stop - v.start)].view(h.shape[0], -1)
            products.into(raw, h, head.columns(v, products.dtype).T)
            if head.kept is not None:
                head.kept.save(head.at(r), v, raw)
            here = None if blocks is None else blocks[:, v.start // BLOCK : n_blocks(v.stop)]
            target = head.targets(r, v, h.shape[0])
            bias = head.bias_of(v, products.wide)
            softmax.fold(raw, target, bias, part, map, here)

    return plan.rows, plan.rows if o.deterministic else 0, tiles

"""The divergence of a student's next-token distribution from a teacher's, tile by tile.

With a the distribution that weighs (q in forward_kl, p in reverse_kl), b the other one and d = z_a
- z_b, one pass over both heads folds every tile of logits into

    m_a = max z_a     s_a = sum exp(z_a - m_a)     u = sum exp(z_a - m_a) (d - d0)     m_b, s_b

and KL(a || b) = u / s_a + d0 - lse_a + lse_b. d0 is a row's own number, near d: a common offset
of either side's logits loses nothing. jsd needs both lse before its sum: a second pass. A word
that a bias of -inf rules out weighs nothing; where only b rules it out, KL is infinite. The
gradient of the student's logits, for upstream c, in which the teacher's are a constant:

    forward_kl   c (p - q)
    reverse_kl   c p (log p - log q - KL)
    jsd          c (1 - beta) p (log p - log m - KL(p || m))

Units of N V D (one product is 2; D the mean of both widths): forward 4, jsd 8; backward 8 times
the share of (row, block of 128 columns) pairs that are kept. Of a block the forward knows a bound
B_b of its gradient's 1-norm: P_b + Q_b; A_b + P_b |d0 - lse_p + lse_q - KL|, A_b = sum p |d - d0|;
(1 - beta) (sum p |log p - log m| + P_b KL(p || m)). A row drops its blocks below a threshold of
at most tail_eps min(1, sum of B_b), halved until they hold no more than 32 thresholds:

    ||dropped dz||_1 <= 32 tail_eps |c|

Workspace is memory_mib; beside it one float32 dH, and 1 bit a pair until the backward.

Products are PyTorch's. What a row needs is made of numbers of blocks (divergence_stats.py), and
these of two tiles of products, in PyTorch or in one pass of a Triton kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from riskpo_kernels.core.checks import choose
from riskpo_kernels.core.gradient import Accumulator
from riskpo_kernels.core.matmul import Head, Plan, plan_tiles, products_of, put_among, spans
from riskpo_kernels.core.operators import differentiable
from riskpo_kernels.core.process_groups import group_called, max_over, sum_over
from riskpo_kernels.core.softmax import BLOCK, CAP, ActiveBlocks, LogitMap, keep_blocks, n_blocks
from riskpo_kernels.lm_head.divergence_stats import (
    Fold,
    Mixture,
    Pair,
    Room,
    Stats,
    TorchTiles,
)
from riskpo_kernels.lm_head.vocab_parallel import VocabShard

OP = "linear_divergence"
KINDS = ("forward_kl", "reverse_kl", "jsd")
TILE = {"cuda": (4096, 8192), "cpu": (1024, 2048)}  # (rows, cols) of the largest one
# divergence | peaks and log-sums of student and teacher | KL of the row's gradient | active blocks
RESULTS = 9


@dataclass(frozen=True)
class Words:
    """What is not a tensor."""

    kind: str
    beta: float
    temperature: float
    scale: float
    softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    tail_eps: float
    group: str
    memory_mib: float
    backend: str


def _tiles_of(pair: Pair, w: Words, room: Room) -> Any:
    """What makes numbers of two tiles: statistics, mixture and gradient."""
    # the kernels see float32 products only: their inputs' type does not matter to the interpreter
    if choose(OP, w.backend, pair.student.hidden.device, pair.wide) == "triton":
        from riskpo_kernels.kernels import divergence_tiles  # needs Triton

        return divergence_tiles
    return TorchTiles(room)


def _pair(tensors: tuple[Any, ...], w: Words) -> Pair:
    hidden, weight, bias, t_hidden, t_weight, t_bias, mask, row_temperature = tensors
    keep = None if mask is None else mask.nonzero()[:, 0]
    heads = []
    for h, wt, b, scale, cap in (
        (hidden, weight, bias, w.scale, w.softcap),
        (t_hidden, t_weight, t_bias, w.teacher_scale, w.teacher_softcap),
    ):
        b = None if b is None else b.contiguous()
        n = h.shape[0] if keep is None else keep.numel()
        t: float | torch.Tensor = w.temperature
        if row_temperature is not None:
            wide = torch.promote_types(torch.promote_types(h.dtype, wt.dtype), torch.float32)
            rows = row_temperature if keep is None else row_temperature[keep]
            t = rows.to(wide).contiguous()
        heads.append(Head(h, wt, b, keep, h.new_empty(n), LogitMap(scale, cap, t)))
    return Pair(*heads)


def _plan(pair: Pair, w: Words, tiles: Any, vocab: int, *, back: bool = False) -> Plan:
    width = pair.student.hidden.shape[1] + pair.teacher.hidden.shape[1]
    rows, cols = TILE["cuda" if pair.student.hidden.is_cuda else "cpu"]
    # both tiles and what is made of them; of blocks what the fold and the choice among them hold
    size = pair.wide.itemsize
    tile = 6 * size if isinstance(tiles, TorchTiles) else 10
    return plan_tiles(
        OP,
        pair.student.n,
        vocab,
        width,
        memory_mib=w.memory_mib,
        most_rows=rows,
        most_cols=cols,
        tile_bytes=tile,
        edge_bytes=size,
        row_bytes=0 if back else 12 * size * n_blocks(vocab),
    )


def _second_pass(
    pair: Pair,
    w: Words,
    r: slice,
    sums: Mixture,
    cols: int,
    group: Any,
    room: Room,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """jsd, KL(p || m) and the bounds [R, B] of rows r."""
    for v in spans(pair.student.vocab, cols):
        sums.tile(v, pair.tile(r, v, room))
    sums.close()
    own, total = sums.own, sums.total
    if group is not None:
        own, total = sum_over(group, torch.stack([own, total]))
    jsd = (w.beta * total + (1 - w.beta) * own).clamp(min=0.0)
    return jsd, own, (1 - w.beta) * (sums.far + sums.p_sum * own[:, None].abs())


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    teacher_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    row_temperature: torch.Tensor | None,
    w: Words,
) -> tuple[torch.Tensor, ...]:
    teacher = (teacher_hidden, teacher_weight, teacher_bias)
    pair = _pair((hidden, weight, bias, *teacher, mask, row_temperature), w)
    n, vocab, wide = pair.student.n, pair.student.vocab, pair.wide
    group, widest, cap = None, vocab, CAP
    if w.group:
        shard = _find_shard(pair, w)
        group, widest, cap = shard.group, shard.widest, CAP / shard.ranks
    active = ActiveBlocks.new(vocab if w.tail_eps else 0, n, hidden.device)
    results = hidden.new_empty(6, n, dtype=wide)
    room = Room(hidden)
    tiles = _tiles_of(pair, w, room)
    plan = _plan(pair, w, tiles, widest)
    blocks = n_blocks(vocab) if w.tail_eps else 0
    apart = None if w.kind == "jsd" else pair.apart(0 if w.kind == "reverse_kl" else 1)
    if apart is not None and group is not None:
        apart = max_over(group, apart.float()) > 0
    for r in spans(n, plan.rows):
        fold = Fold(w.kind, tiles, r.stop - r.start, vocab, results)
        for v in spans(vocab, plan.cols):
            fold.tile(v, pair.tile(r, v, room))
        fold.close()
        if group is not None:
            fold.merge(group)
        stats, value = fold.finish()
        if apart is not None:
            value.masked_fill_(apart, torch.inf)
        own = value
        if w.kind == "jsd":
            sums = Mixture(fold, stats, w.beta)
            value, own, bounds = _second_pass(pair, w, r, sums, plan.cols, group, room)
        elif w.tail_eps:
            bounds = fold.bounds(value)
        results[:, r] = torch.stack([value, *stats, own])
        if w.tail_eps:
            total = bounds.sum(1) if group is None else sum_over(group, bounds.sum(1))
            keep = keep_blocks(bounds, w.tail_eps * total.clamp(max=1.0), cap)
            if blocks:
                active.record(r, keep, by_row=False)
    rows = pair.student.rows
    return *(put_among(rows, hidden.shape[0], x) for x in results), *(
        put_among(rows, hidden.shape[0], x) for x in active
    )


def _find_shard(pair: Pair, w: Words) -> VocabShard:
    same: dict[str, int | torch.Tensor] = {
        "rows": pair.student.n,
        "kind": KINDS.index(w.kind),
        "widths": pair.student.hidden.shape[1] + pair.teacher.hidden.shape[1],
        "memory_mib * 1024": int(w.memory_mib * 1024),
        "tail_eps": int(w.tail_eps > 0),
    }
    return VocabShard.find(OP, group_called(w.group), pair.student.weight, same)


def _wide(tensors: Sequence[Any]) -> torch.dtype:
    dtype = torch.float32
    for x in (tensors[0], tensors[1], tensors[3], tensors[4]):
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _forward_fake(*given: Any) -> tuple[torch.Tensor, ...]:
    *tensors, w = given
    hidden, weight = tensors[:2]
    rows = (hidden.new_empty(hidden.shape[0], dtype=_wide(tensors)) for _ in range(6))
    blocks = ActiveBlocks.new(weight.shape[0] if w.tail_eps else 0, hidden.shape[0], hidden.device)
    return *rows, *blocks


def _backward(
    needs: list[bool],
    upstream: tuple[torch.Tensor, ...],
    tensors: tuple[Any, ...],
    found: tuple[torch.Tensor, ...],
    w: Words,
) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, bias, *_ = tensors
    value, p_peak, p_sum, q_peak, q_sum, own, *blocks = found
    pair, c = _pair(tensors, w), upstream[0]
    c = c.to(value.dtype)
    rows = pair.student.rows
    kept = (c, own, p_peak, p_sum, q_peak, q_sum)
    c, own, *stats = (x if rows is None else x[rows] for x in kept)
    active = ActiveBlocks(*blocks)
    active = active if rows is None else active.of(rows)
    wide = pair.wide
    dh = hidden.new_zeros(pair.student.n, hidden.shape[1], dtype=wide) if needs[0] else None
    dw = Accumulator(weight, wide, whole=False) if needs[1] else None
    db = weight.new_zeros(weight.shape[0], dtype=wide) if needs[2] else None
    sent = c != 0
    factor = c * pair.student.map.scale / pair.student.map.temperature
    tile = _Tile(pair, w, Stats(*stats), own, factor)
    for v, at in _visits(active, sent, tile.plan.cols if not w.tail_eps else 0, weight.shape[0]):
        piece = None if dw is None else dw.open(v)
        for r in at.split(tile.plan.rows):
            tile.add(r, v, dh, piece, db)
        if dw is not None and piece is not None:
            dw.close(v, piece)
    if dh is not None:
        dh = (sum_over(group_called(w.group), dh) if w.group else dh).to(hidden.dtype)
        dh = dh if rows is None else torch.zeros_like(hidden).index_copy(0, rows, dh)
    return (
        dh,
        None if dw is None else dw.grad,
        None if db is None or bias is None else db.to(bias.dtype),
    )


def _visits(
    active: ActiveBlocks, sent: torch.Tensor, cols: int, vocab: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Columns, and the rows that need them: `cols` at a time of all rows, by 0 active blocks."""
    if cols:
        everyone = sent.nonzero()[:, 0]
        for v in spans(vocab, cols):
            yield v, everyone
        return
    for block, count in enumerate(active.among(sent).counts(vocab).tolist()):
        if count:
            flags = (active.bits[block // 8] >> (block % 8)) & 1
            at = torch.nonzero_static(flags.bool() & sent, size=count)[:, 0]
            yield slice(block * BLOCK, min((block + 1) * BLOCK, vocab)), at


class _Tile:
    """The gradient of a tile of the student's logits, into its sums."""

    def __init__(self, pair: Pair, w: Words, stats: Stats, own: torch.Tensor, factor: torch.Tensor):
        self.pair, self.w, self.numbers = pair, w, torch.stack([*stats, own, factor])
        self.room = Room(own)
        self.tiles = _tiles_of(pair, w, self.room)
        widest = min(BLOCK, pair.student.vocab) if w.tail_eps else pair.student.vocab
        self.plan = _plan(pair, w, self.tiles, widest, back=True)

    def add(
        self, r: torch.Tensor, v: slice, dh: torch.Tensor | None, dw: torch.Tensor | None, db: Any
    ) -> None:
        sides, products = self.pair.tile(r, v, self.room), products_of(self.pair.student)
        p, q = (x.tile for x in sides)
        raw, numbers = p.raw, self.numbers.index_select(1, r)
        dz, parts = raw, None
        if products.dtype != raw.dtype:
            dz = self.room.take("dz", products.dtype, *raw.shape)
        if db is not None:
            parts = self.room.take(
                "sums", numbers.dtype, -(-len(r) // self.tiles.ROWS), raw.shape[1]
            )
        self.tiles.gradient(self.w.kind, self.w.beta, p, q, numbers, dz, parts)
        if parts is not None:
            db[v] += parts.sum(0)
        _, h, weight = sides[0]
        if dh is not None:
            part = self.room.take("dh", dh.dtype, *h.shape)
            dh.index_add_(0, r, products.into(part, dz, weight))
        if dw is not None:
            products.add(dw, dz.T, h)


divergence_operator = differentiable(
    OP, _forward, _backward, Words, fake=_forward_fake, results=RESULTS, sent=1
)

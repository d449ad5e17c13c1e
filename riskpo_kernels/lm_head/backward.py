"""The backward of a head: each row goes the dense way or the sparse one, into the same gradients.

At most one float32 buffer of a whole gradient is made, and none for a float32 weight: of dH or dW,
whichever is smaller, or of dW where dense and sparse rows meet. Rows that are many go through in
pieces, whose dH is summed apart.

One host synchronisation on a GPU, before anything else: lm_head/ways.py. None while a CUDA
graph is captured: then sizes are those of the worst case, and the way is one for all rows. With the
Triton kernels and a tail_eps it is the sparse one, whose groups of blocks have room for every row
in every block: N V / 128 pairs of 276 bytes, 3 / 8 memory_mib at a time; else the dense one, with a
copy of hidden beside memory_mib.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from riskpo_kernels.core.gradient import Accumulator, Gradients, RowGradient, gradient
from riskpo_kernels.core.matmul import (
    Head,
    Options,
    Plan,
    Products,
    bytes_of_logit,
    plan_for,
    products_of,
    spans,
)
from riskpo_kernels.core.softmax import ActiveBlocks
from riskpo_kernels.lm_head.sparse_torch import sparse_backward
from riskpo_kernels.lm_head.ways import Ways, find_ways, unasked_ways

WIDE_STEP = 256  # columns of the widest tile of kernels/head_tile.py
ROUNDING_STEP = 4096  # rows of a float32 buffer that are rounded at a time


def backward_rows(
    head: Head,
    up: RowGradient,
    active: ActiveBlocks | None,
    ways: Ways,
    needs: Sequence[bool],
    o: Options,
    *,
    wide_dh: bool = False,
    wide_dw: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dH [N, D], dW [V, D], dbias [V] of the rows that `ways` keeps, None where not needed; in the
    dtypes of what they are gradients of, or (wide_dh; wide_dw, of dbias too) as their sums are."""
    products = products_of(head)
    unit = _unit(up, products)
    if unit is not None:
        up = up.divided(unit)
    free = wide_dw or head.weight.dtype == products.wide  # dW is its own sums: it needs no buffer
    dense, both = ways.dense, ways.dense is not None and bool(ways.sparse)
    rows_outer = both or free or not needs[1] or (needs[0] and head.vocab <= head.n)
    plan, once = None, o.backend == "torch" and len(ways.sparse) == 1
    if dense is not None:
        plan = dense_plan(head, o, products, rows_outer)
        once = not (both or o.deterministic) and plan.rows >= head.n
    dw_pieces = rows_outer if dense is not None else free or head.n > head.vocab
    dw = None
    if needs[1]:
        dw = _sums_of_weight(head, products, whole=dw_pieces and not once, wide=wide_dw, once=once)
    db = torch.zeros(head.vocab, dtype=products.wide, device=head.hidden.device)
    into = Gradients(None, dw, db if needs[2] else None)
    dh = None
    if needs[0]:
        dtype = products.wide if wide_dh else head.hidden.dtype
        dh = torch.zeros(len(head.hidden), head.width, dtype=dtype, device=head.hidden.device)

    if dense is not None and plan is not None:
        part, sent = (head.of(dense), up.of(dense)) if ways.sparse else (head, up)
        into.dh = _rows_of(dh, part, products, unit, whole=not rows_outer)
        _set_unit(into, unit)
        dense_backward(part, sent, o, into, rows_outer, plan)
        _finish(into.dh)
    for s, counts in (ways if dw_pieces else ways.whole()).sparse:
        assert active is not None
        part, sent, blocks = head, up, active
        if s.numel() < head.n:
            part, sent, blocks = head.of(s), up.of(s), active.of(s)
        into.dh = _rows_of(dh, part, products, unit, whole=True)
        _set_unit(into, unit)
        _sparse(head, o)(part, sent, blocks, counts, o, into)
        _finish(into.dh)
    if dw is not None:
        dw.finish(ROUNDING_STEP)
    if unit is not None:
        db *= unit
    return (
        dh,
        None if dw is None else dw.grad,
        db.to(db if wide_dw else head.bias) if needs[2] and head.bias is not None else None,
    )


def _sums_of_weight(
    head: Head, products: Products, *, whole: bool, wide: bool, once: bool
) -> Accumulator:
    """wide: the gradient is as its sums are."""
    columns = head.weight.shape[1] if head.low_rank is None else head.low_rank.width
    dtype, grad = products.wide if wide else head.weight.dtype, None
    if wide:
        new = head.weight.new_empty if once and head.order is None else head.weight.new_zeros
        grad = new((head.vocab, columns), dtype=dtype)
    index, moved = None if head.order is None else head.order.ids, dtype == products.wide
    how = {"whole": whole, "once": once, "moved": moved}
    return Accumulator(head.weight, products.wide, index=index, grad=grad, **how)


def _sparse(head: Head, o: Options) -> Callable[..., None]:
    if o.backend == "torch":
        return sparse_backward
    from riskpo_kernels.lm_head import (
        sparse_triton as sparse_launch,  # needs Triton: only on demand
    )

    return sparse_launch.sparse_backward


def arranged(
    head: Head, up: RowGradient, active: ActiveBlocks | None, sent: torch.Tensor, o: Options
) -> tuple[Head, RowGradient, ActiveBlocks | None, Ways]:
    """What the backward goes over, and each row's way, given which have a coefficient (bool [n]).
    Rows without one are left out, or (in a CUDA graph, which asks nothing) have no part in it."""
    piece = _piece(head, products_of(head), o)
    if not is_captured(head.hidden.device):
        ways = find_ways(sent, active, head.vocab, piece)
        if ways.keep is not None:
            head, up = head.of(ways.keep), up.of(ways.keep)
            active = None if active is None else active.of(ways.keep)
        return head, up, active, ways
    if active is None or o.backend == "torch":
        head, active = _cleared(head, ~sent), None
        up = up._replace(
            peak=up.peak.masked_fill(~sent, 0.0), log_sum=up.log_sum.masked_fill(~sent, 0.0)
        )
    else:
        active = active.among(sent)
    return head, up, active, unasked_ways(head.n, active is None, piece, sent.device)


def _cleared(head: Head, rows: torch.Tensor) -> Head:
    """With zeros for the hidden states of some of all rows (bool [N]), whatever they hold."""
    low = head.low_rank
    if low is not None:
        low = replace(low, u=low.u.masked_fill(rows[:, None], 0.0))
    return replace(head, hidden=head.hidden.masked_fill(rows[:, None], 0.0), low_rank=low)


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph records what is launched there: the host may not wait for it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _piece(head: Head, products: Products, o: Options) -> int:
    """Rows whose float32 dH takes half of the workspace."""
    # beside an adapter's columns the kernels' operands are copies
    copied = 0 if o.backend == "torch" or head.low_rank is None else products.dtype.itemsize
    return max(256, int(o.memory_mib * 2**19) // (head.width * (products.wide.itemsize + copied)))


def _rows_of(
    dh: torch.Tensor | None,
    part: Head,
    products: Products,
    unit: torch.Tensor | None,
    *,
    whole: bool,
) -> Accumulator | None:
    if dh is None:
        return None
    return Accumulator(dh, products.wide, whole=whole, index=part.rows, grad=dh)


def _finish(dh: Accumulator | None) -> None:
    if dh is not None:
        dh.finish(ROUNDING_STEP)


def _set_unit(into: Gradients, unit: torch.Tensor | None) -> None:
    for accumulator in (into.dh, into.dw):
        if accumulator is not None:
            accumulator.unit = unit


def _unit(up: RowGradient, products: Products) -> torch.Tensor | None:
    """Gradients of a mean over many tokens vanish in fp16's range: they are divided by their
    largest before they are rounded, and the sums are multiplied by it."""
    if not products.mixed or products.dtype != torch.float16 or not up.offset.numel():
        return None
    return torch.stack(up.parts).abs().amax().clamp(min=torch.finfo(torch.float32).tiny)


# (hidden states and weights of a tile, which rows and columns, the rows' numbers, rows to pad to)
TileGradient = Callable[[torch.Tensor, torch.Tensor, slice, slice, RowGradient, int], torch.Tensor]


def _torch_dz(head: Head, products: Products, size: int, db: torch.Tensor | None) -> TileGradient:
    """What makes the gradient of a tile of at most `size` logits, and adds to dbias: a product,
    then a pass over it."""
    tile = torch.empty(size, dtype=products.wide, device=head.hidden.device)
    small = torch.empty_like(tile, dtype=products.dtype) if products.mixed else tile

    def dz_of(
        h: torch.Tensor, w: torch.Tensor, r: slice, v: slice, up: RowGradient, pad: int
    ) -> torch.Tensor:
        raw, dz = (x[: h.shape[0] * w.shape[0]].view(h.shape[0], -1) for x in (tile, small))
        head.logits(products, r, v, h, w, raw)
        bias, map = head.bias_of(v, products.wide), head.map_of(r, pad)
        # dbias is summed before the rounding; where there is none dz is raw under another name
        out = dz if products.mixed and db is None else raw
        gradient(raw, head.targets(r, v, pad), bias, up, map, out)
        if db is not None:
            db[head.ids(v)] += raw.sum(0)
            if products.mixed:
                dz.copy_(raw)
        return dz

    return dz_of


def _triton_dz(head: Head, products: Products, size: int, db: torch.Tensor | None) -> TileGradient:
    """The same in one kernel, which rounds where it multiplies."""
    from riskpo_kernels.kernels.dense_gradient import tile_gradient  # needs Triton: on demand

    tile = torch.empty(size, dtype=products.dtype, device=head.hidden.device)

    def dz_of(
        h: torch.Tensor, w: torch.Tensor, r: slice, v: slice, up: RowGradient, pad: int
    ) -> torch.Tensor:
        rows, columns = h.shape[0], w.shape[0]
        wide = _in_sixteens(columns)
        dz = tile[: rows * wide].view(rows, wide)[:, :columns]
        bias, map = head.bias_of(v, products.wide), head.map_of(r, pad)
        given = bias, head.targets(r, v, pad), up, map, dz
        sums = tile_gradient(h, w, *given, sums=db is not None)
        if db is not None and sums is not None:
            db[head.ids(v)] += sums
        return dz

    return dz_of


def _in_sixteens(columns: int) -> int:
    """Columns from one row of dz to the next: the kernel writes 16 at once."""
    return -(-columns // 16) * 16


def dense_plan(head: Head, o: Options, products: Products, rows_outer: bool) -> Plan:
    """The tile of the dense backward. rows_outer: the sums of rows are opened and closed piece by
    piece, else those of columns."""
    outer = 0 if rows_outer else 1
    edges = (3 * products.wide.itemsize,) * 2
    if not products.mixed or o.deterministic:
        return plan_for(head, o, products, head.vocab, edges=edges)
    edges = sixteen_bit_edges(head, products, outer)
    plan = plan_for(head, o, products, head.vocab, edges=edges)
    if outer == 0:
        return plan
    of_logit = bytes_of_logit(o, products, back=True)
    return all_rows_at_once(plan, head.n, head.vocab, head.width, o.memory_mib, of_logit, edges)


def sixteen_bit_edges(head: Head, products: Products, outer: int) -> tuple[int, int]:
    """Bytes live beside a tile of the dense backward, per number of its rows' hidden states and of
    its columns' head: copies where the products cannot read what is there, and of the axis that is
    opened and closed the float32 sums, with a rounded copy where rows lie apart."""
    low = head.low_rank is not None
    copied = [
        2 if low or apart or x.dtype != products.dtype else 0
        for x, apart in ((head.hidden, head.rows is not None), (head.weight, False))
    ]
    copied[outer] += 4 + (2 if outer == 0 and head.rows is not None else 0)
    return copied[0], copied[1]


def all_rows_at_once(
    plan: Plan,
    n: int,
    vocab: int,
    width: int,
    memory_mib: float,
    tile_bytes: int,
    edges: tuple[int, int],
) -> Plan:
    """A tile of all rows and as many columns as fit, if less of the sums moves than in `plan`. Each
    tile reads and writes the float32 dH of its rows; dW's too, but where all rows come at once."""
    room = int(memory_mib * 2**20) - edges[0] * width * n
    cols = room // (tile_bytes * n + edges[1] * width) // WIDE_STEP * WIDE_STEP
    if n < 1 or cols < WIDE_STEP:
        return plan
    several = 0 if plan.rows >= n else vocab * -(-n // plan.rows)
    if n * -(-vocab // cols) < n * -(-vocab // plan.cols) + several:
        return Plan(n, min(cols, vocab))
    return plan


def dense_backward(
    head: Head, up: RowGradient, o: Options, into: Gradients, rows_outer: bool, plan: Plan
) -> None:
    """Add every column of the rows to the gradients. The axis of the outer loop is opened and
    closed piece by piece; the other one is visited again and again."""
    products = products_of(head)
    pad = plan.rows if o.deterministic else 0
    make = _torch_dz if o.backend == "torch" else _triton_dz
    dz_of = make(head, products, plan.rows * _in_sixteens(plan.cols), into.db)

    held: list[Any] = []  # rows, their hidden states and numbers: often a copy

    def one_tile(r: slice, v: slice, dh: torch.Tensor | None, dw: torch.Tensor | None) -> None:
        if not held or held[0] != r:
            held.clear()
            held.extend((r, head.take(r, products.dtype, pad), up.of(r, pad)))
        h, w = held[1], head.columns(v, products.dtype)
        dz = dz_of(h, w, r, v, held[2], pad)
        if dh is not None:
            products.add(dh, dz, w, apart=o.deterministic)
        if dw is not None and into.dw is not None:
            (products.into if into.dw.once else products.add)(dw, dz.T, head.trained(h))

    rows, cols = (head.n, plan.rows, into.dh), (head.vocab, plan.cols, into.dw)
    outer, inner = (rows, cols) if rows_outer else (cols, rows)
    for a in spans(*outer[:2]):
        piece = None if outer[2] is None else outer[2].open(a)
        for b in spans(*inner[:2]):
            other = None if inner[2] is None else inner[2].open(b)
            if rows_outer:
                one_tile(a, b, piece, other)
            else:
                one_tile(b, a, other, piece)
            if inner[2] is not None and other is not None:
                inner[2].close(b, other)
        if outer[2] is not None and piece is not None:
            outer[2].close(a, piece)

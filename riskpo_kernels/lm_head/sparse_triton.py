"""Lists active pairs block by block and launches the three products of kernels/sparse_blocks.py.

As many blocks at a time as fit in memory_mib: their lists, and dz of all their pairs. The lists are
made on the device. The host knows how many pairs each block has, or (while a CUDA graph is
captured) takes the worst case, every row in every block: then there are more groups of blocks, and
programs beyond the last tile or job return.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from riskpo_kernels.core.gradient import Accumulator, Gradients, RowGradient
from riskpo_kernels.core.matmul import Head, Options, executed, products_of, spans
from riskpo_kernels.core.softmax import BLOCK, ActiveBlocks, n_blocks
from riskpo_kernels.kernels import at_most, multiprocessors, of_rows, readable
from riskpo_kernels.kernels.sparse_blocks import (
    BK,
    STAGES,
    WARPS,
    dz_kernel,
    register_limit,
    tile_rows,
)
from riskpo_kernels.kernels.sparse_hidden import BD, GATHER_WARPS, dh_kernel, gather_kernel
from riskpo_kernels.kernels.sparse_weight import BD as BD_W
from riskpo_kernels.kernels.sparse_weight import REGISTERS, dw_kernel, fold_kernel
from riskpo_kernels.lm_head.ways import block_groups

# A job of dW is an eighth of a multiprocessor's share at most, but 16 tiles, beside which its sums
# are little to write and read again. Counted, not measured.
EVEN, FEWEST_TILES = 8, 16


def sparse_backward(
    head: Head,
    up: RowGradient,
    active: ActiveBlocks,
    counts: list[int] | None,
    o: Options,
    into: Gradients,
) -> None:
    """Add the active pairs of the rows to the gradients; same contract as
    riskpo_kernels.lm_head.sparse_torch.sparse_backward. counts None: nobody has asked."""
    products = products_of(head)
    if counts is None:
        most, each = [head.n] * n_blocks(head.vocab), active.counts(head.vocab)
    else:
        most, each = counts, torch.tensor(counts).to(head.hidden.device, non_blocking=True)
    copied = 0 if head.low_rank is None else BLOCK * head.width * products.dtype.itemsize
    head = _plain(head, products.dtype)
    # a half may hold a float32 piece of dH, an eighth the parts of dH, and after them of dW
    budget = int(o.memory_mib * 3 * 2**17)
    bm = tile_rows(head.n, head.map.softcap is not None, o.deterministic)
    pair_bytes = BLOCK * products.dtype.itemsize + 20  # dz; and the pair's place in the lists
    if o.deterministic:
        pair_bytes += 4 * BD + 40  # its part of dH, and the same lists in another order
    with torch.cuda.device_of(head.hidden):
        for blocks in block_groups(most, head.n, bm, pair_bytes, budget, copied):
            if sum(most[blocks]):
                _one_group(head, up, active, most, each, blocks, o, into)


def _plain(head: Head, dtype: torch.dtype) -> Head:
    """The head as the kernels read it: columns next to each other, of the products' dtype (only
    16-bit hidden with a float32 weight differs), and an index for the rows."""
    rows = torch.arange(head.n, device=head.target.device) if head.rows is None else head.rows
    bias = None if head.bias is None else head.bias.float()
    if head.low_rank is not None:  # columns of the weight are copied when their blocks come
        all_rows, h = torch.arange(head.n, device=rows.device), head.take(slice(None), dtype)
        return replace(head, hidden=h, bias=bias, rows=all_rows)
    hidden, weight = readable(head.hidden, dtype), readable(head.weight, dtype)
    return replace(head, hidden=hidden, weight=weight, bias=bias, rows=rows)


def _at(head: Head, into: Gradients, blocks: slice) -> tuple[Head, Gradients, int]:
    """Columns of the head, their gradients, and the first of the blocks there."""
    if head.low_rank is None:
        return head, into, blocks.start
    v = slice(blocks.start * BLOCK, min(blocks.stop * BLOCK, head.vocab))
    weight, target = head.columns(v, head.hidden.dtype), head.target - v.start
    bias = None if head.bias is None else head.bias[v]
    dw = None if into.dw is None else into.dw.grad[v]
    if dw is not None:
        into = replace(into, dw=Accumulator(dw, dw.dtype, whole=True, grad=dw))
    into = replace(into, db=None if into.db is None else into.db[v])
    return replace(head, weight=weight, bias=bias, target=target), into, 0


def _one_group(
    head: Head,
    up: RowGradient,
    active: ActiveBlocks,
    most: list[int],
    each: torch.Tensor,
    blocks: slice,
    o: Options,
    into: Gradients,
) -> None:
    """most: room for the pairs of each block; each: how many it has."""
    device, dtype = head.hidden.device, head.hidden.dtype
    bm = tile_rows(head.n, head.map.softcap is not None, o.deterministic)
    n_tiles = sum(-(-n // bm) for n in most[blocks])
    tiles_each = (each[blocks] + bm - 1) // bm
    starts, tiles = begins(each[blocks]), begins(tiles_each)
    tile_block = runs(tiles, n_tiles)
    rows = active.pair_rows(blocks, sum(most[blocks]))
    dz = torch.empty(n_tiles, bm, BLOCK, dtype=dtype, device=device)
    sums = None  # of the columns of each tile, before dz is rounded
    if into.db is not None:
        sums = torch.empty(n_tiles, BLOCK, dtype=torch.float32, device=device)
    lists = dict(p_rows=rows, p_starts=starts, p_tiles=tiles, n_blocks=tiles_each.numel())
    head, into, first = _at(head, into, blocks)
    sizes = dict(D=head.hidden.shape[1], V=head.vocab, first_block=first)
    room = int(o.memory_mib * 2**17)
    _launch_dz(head, up, dz, sums, tile_block, lists, sizes)
    if into.dh is not None:
        dh, in_order = into.dh.open(slice(0, head.n)), room if o.deterministic else None
        _launch_dh(head, dh, dz, tile_block, in_order, lists, sizes)
    if into.dw is not None or into.db is not None:
        _launch_dw(head, into, dz, sums, tiles_each, room, lists, sizes)


def _launch_dz(
    head: Head,
    up: RowGradient,
    dz: torch.Tensor,
    sums: torch.Tensor | None,
    tile_block: torch.Tensor,
    lists: dict[str, Any],
    sizes: dict[str, int],
) -> None:
    executed(dz.numel(), sizes["D"])
    dz_kernel[(dz.shape[0],)](
        p_hidden=head.hidden,
        p_weight=head.weight,
        p_bias=head.bias,
        p_index=head.rows,
        p_tile_block=tile_block,
        p_target=head.target,
        **of_rows(head.map, up),
        p_dz=dz,
        p_sums=sums,
        stride_h=head.hidden.stride(0),
        stride_w=head.weight.stride(0),
        BM=dz.shape[1],
        BLOCK=BLOCK,
        BK=BK,
        num_warps=WARPS,
        num_stages=STAGES,
        **at_most(register_limit(dz.shape[1])),
        **lists,
        **sizes,
    )


def _launch_dh(
    head: Head,
    dh: torch.Tensor,
    dz: torch.Tensor,
    tile_block: torch.Tensor,
    in_order: int | None,
    lists: dict[str, Any],
    sizes: dict[str, int],
) -> None:
    """Add to dH [n, D]: by atomics, or in the order of a row's blocks with in_order bytes of room
    for the pairs' products, as many columns at a time as fit."""
    executed(dz.numel(), sizes["D"])

    def products(out: torch.Tensor, c: slice, atomic: bool) -> None:
        weight = head.weight[:, c]
        dh_kernel[(dz.shape[0], -(-weight.shape[1] // BD))](
            p_weight=weight,
            p_tile_block=tile_block,
            p_dz=dz,
            p_dh=out,
            stride_w=weight.stride(0),
            stride_dh=out.stride(0),
            ATOMIC=atomic,
            BM=dz.shape[1],
            BLOCK=BLOCK,
            BD=BD,
            num_warps=WARPS,
            num_stages=STAGES,
            **at_most(register_limit(dz.shape[1])),
            **lists,
            **sizes | {"D": weight.shape[1]},
        )

    if in_order is None:
        products(dh, slice(None), atomic=True)
        return
    rows = lists["p_rows"]
    sorted_rows, order = torch.sort(rows, stable=True)
    ends = torch.arange(head.n + 1, dtype=rows.dtype, device=rows.device)
    first_pair = torch.searchsorted(sorted_rows, ends)
    columns = BD * max(1, min(in_order // (4 * BD * rows.numel()), -(-sizes["D"] // BD)))
    parts = torch.empty(rows.numel(), columns, dtype=torch.float32, device=rows.device)
    for c in spans(sizes["D"], columns):
        products(parts, c, atomic=False)
        gather_kernel[(head.n, -(-(c.stop - c.start) // BD))](
            p_parts=parts,
            p_order=order,
            p_first_pair=first_pair,
            p_dh=dh[:, c],
            D=c.stop - c.start,
            stride_parts=columns,
            stride_dh=dh.stride(0),
            BD=BD,
            num_warps=GATHER_WARPS,
        )


def _launch_dw(
    head: Head,
    into: Gradients,
    dz: torch.Tensor,
    sums: torch.Tensor | None,
    tiles_each: torch.Tensor,
    room: int,
    lists: dict[str, Any],
    sizes: dict[str, int],
) -> None:
    """dW (and dbias) of the group's blocks, written, or added to the sums where rows come in
    several pieces."""
    add, unit, dw, hidden = True, None, into.dw, head.trained(head.hidden)
    sizes = sizes | {"D": 1 if dw is None else hidden.shape[1]}
    if dw is None:  # dbias alone: one column of a head nobody asked for
        out = torch.zeros(head.vocab, 1, dtype=torch.float32, device=dz.device)
    elif dw.buffer is not None or dw.direct:
        out = dw.grad if dw.buffer is None else dw.buffer
    else:
        add, unit, out = False, dw.unit, dw.grad
    columns = -(-sizes["D"] // BD_W)
    n_tiles, here = dz.shape[0], tiles_each.numel()
    fitting = room // (BLOCK * 4 * sizes["D"])
    most = longest_job(n_tiles, here, columns, multiprocessors(dz.device), fitting)
    n_parts = most_parts(n_tiles, here, most)
    job_block, first_job, first_part = jobs_of(tiles_each, n_tiles, most)
    parts = torch.empty(n_parts * BLOCK, sizes["D"], dtype=torch.float32, device=dz.device)
    part_sums = None if into.db is None else parts.new_empty(parts.shape[0])
    both: dict[str, Any] = dict(p_parts=parts, p_part_sums=part_sums, p_first_part=first_part)
    both |= dict(p_dw=out, p_db=into.db, p_unit=unit, stride_dw=out.stride(0), BLOCK=BLOCK, BD=BD_W)
    both |= dict(ADD=add, **sizes)
    executed(dz.numel(), sizes["D"])
    dw_kernel[(job_block.numel(), columns)](
        p_hidden=hidden,
        p_index=head.rows,
        p_dz=dz,
        p_sums=sums,
        p_job_block=job_block,
        p_first_job=first_job,
        most=most,
        stride_h=hidden.stride(0),
        BM=dz.shape[1],
        num_warps=WARPS,
        num_stages=STAGES,
        **at_most(REGISTERS),
        **lists,
        **both,
    )
    if n_parts:
        fold_kernel[(here, columns)](num_warps=WARPS, **both)


def begins(each: torch.Tensor) -> torch.Tensor:
    """Where each of consecutive runs begins, and where the last one ends."""
    return torch.nn.functional.pad(each.cumsum(0), (1, 0))


def runs(begin: torch.Tensor, n: int) -> torch.Tensor:
    """Which of the runs that begin and end there [B + 1] each of 0 .. n - 1 lies in; B: behind the
    last one."""
    at = torch.arange(n, device=begin.device)
    return torch.searchsorted(begin, at, right=True) - 1


def most_parts(n_tiles: int, n_blocks: int, most: int) -> int:
    """No more parts than this there are, however n_tiles are spread over the blocks: at most n of
    them have more than `most` tiles, and each ends with a part that is not full."""
    n = min(n_blocks, n_tiles // (most + 1))
    return (n_tiles + n * (most - 1)) // most if n else 0


def longest_job(n_tiles: int, n_blocks: int, columns: int, multiprocessors: int, parts: int) -> int:
    """The most tiles of a block that are one job of dW: no job goes on for long when the others are
    done, and no more parts than given are left to be added up."""
    most = max(FEWEST_TILES, n_tiles * columns // (EVEN * multiprocessors))
    while most_parts(n_tiles, n_blocks, most) > parts:
        most *= 2
    return most


def jobs_of(
    tiles_each: torch.Tensor, n_tiles: int, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """job_block, first_job and first_part of kernels/sparse_weight.py; as many jobs as there can
    be."""
    each = (tiles_each + most - 1) // most
    first_job, first_part = begins(each), begins(each.masked_fill(each < 2, 0))
    return runs(first_job, each.numel() + n_tiles // most), first_job, first_part

"""Two heads at once: logits and softmax statistics, tile by tile, and what these say of them.

lm_head/divergence.py has the formulas.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from riskpo_kernels.core.process_groups import max_over, sum_over
from riskpo_kernels.core.softmax import BLOCK, FLOOR, RawTile, mapped
from riskpo_kernels.lm_head.block_filter import n_blocks
from riskpo_kernels.lm_head.tiles import Head, products_of

LOWEST = -1e30  # stands for a bias of -inf: differences of such logits are numbers


class Room:
    """Memory that all tiles share: on a CPU the pages of a fresh tensor cost more than most of what
    is computed in them."""

    def __init__(self, like: torch.Tensor):
        self.like = like
        self.held: dict[str, torch.Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, rows: int, cols: int) -> torch.Tensor:
        """[rows, cols], undefined. What was taken under this name before is overwritten."""
        size = rows * cols
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = self.like.new_empty(size, dtype=dtype)
        return self.held[name][:size].view(rows, cols)

    def beside(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Another one of x's shape."""
        return self.take(name, x.dtype, *x.shape)


class Side(NamedTuple):
    """A tile of one head."""

    tile: RawTile
    hidden: torch.Tensor  # [R, D]
    weight: torch.Tensor  # [C, D]

    def logits(self, wide: torch.dtype, *, slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """z [R, C] where the products were, and the softcap's slope where it is wanted."""
        z, capped = mapped(*self.tile, slope=slope)
        return z.to(wide), capped


class Pair(NamedTuple):
    """Both heads over the live rows."""

    student: Head
    teacher: Head

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(products_of(self.student).wide, products_of(self.teacher).wide)

    def tile(self, r: slice | torch.Tensor, v: slice, room: Room) -> tuple[Side, Side]:
        """The products of either side, in `room`."""
        sides = []
        for side, head in zip(("student", "teacher"), self, strict=True):
            products = products_of(head)
            if isinstance(r, slice):
                h = head.take(r, products.dtype)
            else:
                h = room.take(f"{side}'s rows", head.hidden.dtype, len(r), head.hidden.shape[1])
                at = r if head.rows is None else head.rows[r]
                h = torch.index_select(head.hidden, 0, at, out=h).to(products.dtype)
            w = head.weight[v].to(products.dtype)
            raw = room.take(side, products.wide, h.shape[0], w.shape[0])
            products.into(raw, h, w.T)
            bias = head.bias_of(v, products.wide)
            bias = None if bias is None else bias.clamp(min=LOWEST)
            sides.append(Side(RawTile(raw, bias, head.map_of(r)), h, w))
        return sides[0], sides[1]

    def apart(self, own: int) -> torch.Tensor | None:
        """Whether side `own` has a word that the other side's bias rules out: KL is infinite."""
        ruled_out = [
            head.bias.isneginf() if head.bias is not None and head.map.softcap is None else None
            for head in self
        ]
        mine, other = ruled_out[own], ruled_out[1 - own]
        if other is None:
            return None
        return (other if mine is None else other & ~mine).any()


class Stats(NamedTuple):
    """[n] each: largest logit and log of the sum of exp(z - largest) of student and teacher."""

    p_peak: torch.Tensor
    p_sum: torch.Tensor
    q_peak: torch.Tensor
    q_sum: torch.Tensor

    def log_probs(self, zp: torch.Tensor, zq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In place."""
        p_peak, p_sum, q_peak, q_sum = (x[:, None] for x in self)
        return zp.sub_(p_peak).sub_(p_sum), zq.sub_(q_peak).sub_(q_sum)


def mixture(
    log_p: torch.Tensor, log_q: torch.Tensor, beta: float, out: torch.Tensor, spare: torch.Tensor
) -> torch.Tensor:
    """log m of jsd into `out`; `spare`, which may be log_q, is overwritten."""
    torch.add(log_p, math.log1p(-beta), out=out)
    return torch.logaddexp(torch.add(log_q, math.log(beta), out=spare), out, out=out)


def gradient_of(
    kind: str,
    beta: float,
    sides: tuple[Side, Side],
    numbers: torch.Tensor,
    room: Room,
    dtype: torch.dtype,
    sums: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """That of the divergence in the raw student's logits, [R, C] in `dtype`, in the tiles' memory,
    and its column sums where wanted. numbers [6, R]: Stats, KL(p || q) (of jsd KL(p || m)) and a
    factor."""
    wide = numbers.dtype
    zp, slope = sides[0].logits(wide, slope=True)
    log_p, log_q = Stats(*numbers[:4]).log_probs(zp, sides[1].logits(wide, slope=False)[0])
    kl, factor = numbers[4:, :, None]
    if kind == "forward_kl":
        dz = log_p.exp_().sub_(log_q.exp_())
    else:
        spare = room.beside("beside", log_p)
        if kind == "jsd":
            log_q.copy_(mixture(log_p, log_q, beta, spare, log_q))
        p = torch.exp(log_p, out=spare)
        dz = log_p.sub_(log_q).sub_(kl).mul_(p)
        dz = dz.mul_(1 - beta) if kind == "jsd" else dz
    dz.mul_(factor)
    if slope is not None:
        dz.mul_(slope)
    return dz.to(dtype), dz.sum(0) if sums else None


def block_sums(x: torch.Tensor) -> torch.Tensor:
    """[R, ceil(C / 128)] sums over blocks."""
    short = -x.shape[1] % BLOCK
    x = torch.nn.functional.pad(x, (0, short)) if short else x
    return x.unflatten(1, (-1, BLOCK)).sum(2)


class Fold:
    """The statistics of rows, tile by tile. blocks: two columns of numbers a block, [2, R, B], each
    relative to the largest logit when its tile was folded (anchors [2, R, B])."""

    def __init__(
        self, n: int, vocab: int, like: torch.Tensor, wide: torch.dtype, kind: str, bounded: bool
    ):
        """bounded: the bounds of blocks will be asked for."""

        def full(*size: int, value: float = 0.0) -> torch.Tensor:
            return torch.full(size, value, dtype=wide, device=like.device)

        self.m, self.s = full(2, n, value=-torch.inf), full(2, n)  # of student, teacher
        self.u, self.d0 = full(n), full(n, value=-torch.inf)
        self.near = self.d0[:, None]  # what A_b counts from, [R, 1] or [R, B]; merge leaves it
        n_here = n_blocks(vocab) if bounded else 0
        self.blocks, self.anchors = full(2, n, n_here), full(2, n, n_here)
        self.kind, self.own = kind, 0 if kind == "reverse_kl" else 1

    def tile(self, v: slice, sides: tuple[Side, Side], room: Room) -> None:
        """Both sides, whose products are overwritten."""
        z = [x.logits(self.m.dtype, slope=False)[0] for x in sides]
        own, at = self.own, slice(v.start // BLOCK, n_blocks(v.stop))
        m = torch.maximum(self.m, torch.stack([x.amax(1) for x in z]))
        shrink = torch.exp((self.m - m).clamp(min=FLOOR))
        if v.start == 0:
            d0 = m[own] - m[1 - own]
            self.d0.copy_(d0.masked_fill(d0.abs() > -0.1 * LOWEST, 0.0))  # one side is ruled out
        self.s.mul_(shrink)
        self.u.mul_(shrink[own])
        d = None
        if self.kind != "jsd":
            d = torch.sub(z[own], z[1 - own], out=room.beside("beside", z[own]))
            d.sub_(self.d0[:, None])
        for side, x in enumerate(z):
            e = x.sub_(m[side, :, None]).exp_()
            sums = block_sums(e)
            self.s[side] += sums.sum(1)
            if self.blocks.shape[2]:
                self.blocks[side, :, at] = sums
                self.anchors[side, :, at] = m[side, :, None]
            if side == own and d is not None:
                self.u.add_(d.mul_(e).sum(1))
                if self.kind == "reverse_kl" and self.blocks.shape[2]:
                    weighed = block_sums(d.abs_())
        if self.kind == "reverse_kl" and self.blocks.shape[2]:
            # the teacher's masses bound nothing here: A_b in their place
            self.blocks[1, :, at], self.anchors[1, :, at] = weighed, m[0, :, None]
        self.m.copy_(m)

    def close(self) -> None:
        """All tiles were folded."""

    def merge(self, group: Any) -> None:
        """Over the ranks of a vocabulary; an empty shard holds -inf and zeros."""
        m, d0 = max_over(group, self.m.clone()), max_over(group, self.d0.clone())
        shrink = torch.exp((self.m - m).clamp(min=FLOOR))
        self.u += self.s[self.own] * torch.where(self.d0 == -torch.inf, 0.0, self.d0 - d0)
        sums = torch.cat([self.s * shrink, (self.u * shrink[self.own])[None]])
        sum_over(group, sums)
        self.m, self.s, self.u, self.d0 = m, sums[:2], sums[2], d0

    def finish(self) -> tuple[Stats, torch.Tensor]:
        """The statistics and KL(a || b)."""
        log_s = self.s.log()
        a, b = self.own, 1 - self.own
        between = (self.d0 - self.m[a] + self.m[b]) - log_s[a] + log_s[b]
        kl = (self.u / self.s[a] + between).clamp(min=0.0)
        return Stats(self.m[0], log_s[0], self.m[1], log_s[1]), kl

    def bounds(self, kl: torch.Tensor) -> torch.Tensor:
        """B_b [R, B] of forward_kl and reverse_kl."""
        log_s = self.s.log()
        base = torch.stack([self.m[0], self.m[0 if self.kind == "reverse_kl" else 1]])
        lse = torch.stack([log_s[0], log_s[0 if self.kind == "reverse_kl" else 1]])
        masses = self.blocks * torch.exp((self.anchors - (base + lse)[..., None]).clamp(max=0.0))
        if self.kind == "forward_kl":
            return masses[0] + masses[1]
        between = (self.m[1] - self.m[0]) - log_s[0] + log_s[1] - kl
        return masses[1] + masses[0] * (self.near + between[:, None]).abs()


class Mixture:
    """jsd's sums over rows, once their statistics are known."""

    def __init__(self, fold: Fold, stats: Stats, beta: float):
        self.stats, self.beta = stats, beta
        self.total, self.own = torch.zeros_like(fold.m)  # KL(q || m), KL(p || m)
        self.p_sum, self.far = torch.zeros_like(fold.blocks)  # sums of p, p |log p - log m|

    def tile(self, v: slice, sides: tuple[Side, Side], room: Room) -> None:
        """Both sides, whose products are overwritten."""
        zp, zq = (x.logits(self.total.dtype, slope=False)[0] for x in sides)
        log_p, log_q = self.stats.log_probs(zp, zq)
        spare = room.beside("spare", log_p)
        log_m = mixture(log_p, log_q, self.beta, room.beside("beside", log_p), spare)
        q = torch.exp(log_q, out=spare)
        self.total += log_q.sub_(log_m).mul_(q).sum(1)
        gap = torch.sub(log_p, log_m, out=log_m)
        p = log_p.exp_()
        self.own += gap.mul_(p).sum(1)
        if self.far.shape[1]:
            at = slice(v.start // BLOCK, n_blocks(v.stop))
            self.p_sum[:, at], self.far[:, at] = block_sums(p), block_sums(gap.abs_())

    def close(self) -> None:
        """All tiles were folded."""

"""Two heads at once: logits and softmax statistics, tile by tile, and what these say of them.

lm_head/divergence.py has the formulas.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from riskpo_kernels.core.matmul import Head, products_of
from riskpo_kernels.core.process_groups import max_over, sum_over
from riskpo_kernels.core.softmax import BLOCK, FLOOR, RawTile, block_sums, mapped, n_blocks

NUMBERS = {"forward_kl": 5, "reverse_kl": 6, "jsd": 4}  # of a block
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


class TorchTiles:
    """The three passes of kernels/divergence_tiles.py in PyTorch, in memory that all tiles share.
    The contracts are those of its functions; p and q are overwritten."""

    ROWS = 2**31  # of a partial column sum

    def __init__(self, room: Room):
        self.room = room
        self.near = torch.empty(0)  # what A_b counts from: of a row, its first tile's

    def statistics(self, kind: str, p: RawTile, q: RawTile, out: torch.Tensor, first: int) -> None:
        at = slice(first, first + n_blocks(p.raw.shape[1]))
        z = [in_blocks(mapped(*x, slope=False)[0].to(out.dtype)) for x in (p, q)]
        for side, x in enumerate(z):
            top = x.amax(2)
            out[side, at] = top.T
            x.sub_(top[..., None])
        tops = out[:2, at]
        a, b = z if kind == "reverse_kl" else z[::-1]
        if kind == "reverse_kl" and not first:
            near = tops[0].amax(0) - tops[1].amax(0)
            self.near = near.masked_fill_(near.abs() > -0.1 * LOWEST, 0.0)  # one is ruled out
        d = a
        if kind != "jsd":
            d = self.room.take("beside", out.dtype, 1, a.numel()).view(a.shape)
            torch.sub(a, b, out=d)
        for side, x in enumerate(z):
            out[2 + side, at] = x.exp_().sum(2).T
        if kind != "jsd":
            out[4, at] = torch.mul(d, a, out=b).sum(2).T
        if kind == "reverse_kl":
            d.add_((tops[0] - tops[1] - self.near).T[..., None]).abs_()
            out[5, at] = d.mul_(a).sum(2).T

    def mixture(
        self,
        beta: float,
        p: RawTile,
        q: RawTile,
        numbers: torch.Tensor,
        out: torch.Tensor,
        first: int,
    ) -> None:
        log_p, log_q, _ = self._log_probs(p, q, numbers)
        spare = self.room.beside("spare", log_p)
        log_m = self._log_mixture(log_p, log_q, beta, spare)
        mass_q = torch.exp(log_q, out=spare)
        sums = [block_sums(log_q.sub_(log_m).mul_(mass_q))]
        gap, mass = torch.sub(log_p, log_m, out=log_m), log_p.exp_()
        sums.append(block_sums(gap.mul_(mass)))
        sums += [block_sums(gap.abs_()), block_sums(mass)]
        for number, x in enumerate(sums):
            out[number, first : first + x.shape[1]] = x.T

    def gradient(
        self,
        kind: str,
        beta: float,
        p: RawTile,
        q: RawTile,
        numbers: torch.Tensor,
        out: torch.Tensor,
        sums: torch.Tensor | None,
    ) -> None:
        log_p, log_q, slope = self._log_probs(p, q, numbers)
        own, factor = numbers[4:, :, None]
        if kind == "forward_kl":
            dz = log_p.exp_().sub_(log_q.exp_())
        else:
            if kind == "jsd":
                log_q, factor = self._log_mixture(log_p, log_q, beta, log_q), factor * (1 - beta)
            mass = torch.exp(log_p, out=self.room.beside("mass", log_p))
            dz = log_p.sub_(log_q).sub_(own).mul_(mass)
        dz.mul_(factor)
        if slope is not None:
            dz.mul_(slope)
        if sums is not None:
            torch.sum(dz, 0, keepdim=True, out=sums)
        out.copy_(dz)

    def _log_probs(
        self, p: RawTile, q: RawTile, numbers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Of both sides, and the slope of the student's softcap."""
        (z_p, slope), (z_q, _) = mapped(*p, slope=True), mapped(*q, slope=False)
        p_peak, p_sum, q_peak, q_sum = numbers[:4, :, None]
        log_p = z_p.to(numbers.dtype).sub_(p_peak).sub_(p_sum)
        return log_p, z_q.to(numbers.dtype).sub_(q_peak).sub_(q_sum), slope

    def _log_mixture(
        self, log_p: torch.Tensor, log_q: torch.Tensor, beta: float, spare: torch.Tensor
    ) -> torch.Tensor:
        """log m of jsd; `spare`, which may be log_q, is overwritten."""
        out = torch.add(log_p, math.log1p(-beta), out=self.room.beside("log m", log_p))
        return torch.logaddexp(torch.add(log_q, math.log(beta), out=spare), out, out=out)


def in_blocks(x: torch.Tensor) -> torch.Tensor:
    """Logits [R, ceil(C / 128), 128], the last block filled with LOWEST."""
    short = -x.shape[1] % BLOCK
    x = torch.nn.functional.pad(x, (0, short), value=LOWEST) if short else x
    return x.unflatten(1, (-1, BLOCK))


class Fold:
    """The statistics of n rows. Each tile leaves numbers of its blocks of 128 columns; `close`
    makes of them the row's own. With a the side that weighs, b the other one, m_b and m the peaks
    of a block and of the row, near = m_b,a - m_b,b and d0 = m_a - m_b,

        s = sum s_b e^(m_b - m)      u = sum over a's e^(m_b - m) (u_b + s_b (near - d0))

    and A_b counts from the block's own near, or in PyTorch from one of the row."""

    def __init__(self, kind: str, tiles: Any, n: int, vocab: int, like: torch.Tensor):
        self.kind, self.tiles, self.own = kind, tiles, 0 if kind == "reverse_kl" else 1
        # the numbers of a block side by side: a kernel writes all its rows at once
        self.found = like.new_empty(NUMBERS[kind], n_blocks(vocab), n)
        self.m, self.s = like.new_full((2, n), -torch.inf), like.new_zeros(2, n)
        self.u, self.d0 = like.new_zeros(n), like.new_full((n,), -torch.inf)
        self.blocks = self.anchors = like.new_zeros(2, n, 0)
        self.near = self.d0[:, None]

    def tile(self, v: slice, sides: tuple[Side, Side]) -> None:
        """Both sides, whose products may be overwritten."""
        p, q = (x.tile for x in sides)
        self.tiles.statistics(self.kind, p, q, self.found, v.start // BLOCK)

    def close(self) -> None:
        """All tiles were folded."""
        if not self.found.shape[1]:
            return
        (top, s), own = (self.found[:2], self.found[2:4]), self.own
        self.m = top.amax(1)
        self.d0 = self.m[own] - self.m[1 - own]
        shrink = torch.exp(top - self.m[:, None])
        s.mul_(shrink)
        self.s = s.sum(1)
        # two columns of numbers a block [2, R, B], each relative to a largest logit
        self.blocks, self.anchors = s.transpose(1, 2), self.m[..., None]
        if self.kind == "jsd":
            return
        near = top[own] - top[1 - own]
        self.u = (s[own] * (near - self.d0)).addcmul_(self.found[4], shrink[own]).sum(0)
        if self.kind == "reverse_kl":
            # the teacher's masses bound nothing here: A_b in their place
            far = self.found[5].mul_(shrink[0])
            self.blocks = torch.stack([self.blocks[0], far.T])
            self.anchors = self.m[[0, 0], :, None]
            by_row = isinstance(self.tiles, TorchTiles)
            self.near = self.tiles.near[:, None] if by_row else near.T

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
    """jsd's sums over rows, once their statistics are known; those of blocks make room for them."""

    def __init__(self, fold: Fold, stats: Stats, beta: float):
        self.tiles, self.beta = fold.tiles, beta
        self.numbers, self.found = torch.stack([*stats]), fold.found

    def tile(self, v: slice, sides: tuple[Side, Side]) -> None:
        """Both sides, whose products may be overwritten."""
        p, q = (x.tile for x in sides)
        self.tiles.mixture(self.beta, p, q, self.numbers, self.found, v.start // BLOCK)

    def close(self) -> None:
        """KL(q || m), KL(p || m) [R]; of blocks [R, B] sums of p |log p - log m| and p."""
        self.total, self.own = self.found[:2].sum(1)
        self.far, self.p_sum = self.found[2:].transpose(1, 2)

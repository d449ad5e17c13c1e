"""The gradient of a tile of logits, for any upstream gradients of a row's results, and its sums.

With c, g and e those of logprob, entropy and lse, and t the target,

    dz_v = -p_v (c - e + g (log p_v + H))              v != t
    dz_t = (1 - p_t) c + p_t e - p_t g (logprob + H)

core/softmax.py has the statistics that it is made of, kernels/ the same in Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from riskpo_kernels.core.matmul import padded, spans
from riskpo_kernels.core.softmax import FLOOR, LogitMap, RowStats, mapped


class RowGradient(NamedTuple):
    """What the gradient of a row needs beside its logits; lse = peak + log_sum.

    dz_v = -p_v (offset + slope log p_v)   v != t        dz_t = at_target

    All three are 0 where no gradient was sent; slope is None where none was sent to an entropy.
    scale and temperature are in them: their chain rule costs no pass over a tile.
    """

    at_target: torch.Tensor
    offset: torch.Tensor
    slope: torch.Tensor | None
    peak: torch.Tensor
    log_sum: torch.Tensor

    @staticmethod
    def new(
        stats: RowStats,
        c: torch.Tensor | None,
        g: torch.Tensor | None,
        e: torch.Tensor | None,
        map: LogitMap,
    ) -> RowGradient:
        """Of the upstream gradients of logprob, entropy and lse, None where none was sent."""
        logprob = stats.logprob.clamp(min=FLOOR)  # 0 * -inf is NaN
        p = torch.exp(logprob)
        at_target, offset = torch.zeros_like(p), torch.zeros_like(p)
        slope, sent = None, at_target != 0
        if c is not None:
            at_target -= c * torch.expm1(logprob)
            offset += c
            sent |= c != 0
        if e is not None:
            at_target += e * p
            offset -= e
            sent |= e != 0
        if g is not None and stats.entropy is not None:
            at_target -= g * p * (logprob + stats.entropy)
            offset += g * stats.entropy
            slope = g * (map.scale / map.temperature)
            sent |= g != 0
        # a row without an upstream gradient is not read: a NaN in it stays there
        at_target, offset = (
            torch.where(sent, x * (map.scale / map.temperature), 0.0) for x in (at_target, offset)
        )
        return RowGradient(at_target, offset, slope, stats.peak, stats.log_sum)

    @property
    def parts(self) -> list[torch.Tensor]:
        """What is linear in the upstream gradients."""
        return [x for x in (self.at_target, self.offset, self.slope) if x is not None]

    def live(self) -> torch.Tensor:
        """Rows whose gradient is not zero throughout, bool."""
        return torch.stack([x != 0 for x in self.parts]).any(0)

    def divided(self, unit: torch.Tensor) -> RowGradient:
        """The gradient in units of another number."""
        slope = None if self.slope is None else self.slope / unit
        return self._replace(
            at_target=self.at_target / unit, offset=self.offset / unit, slope=slope
        )

    def of(self, rows: slice | torch.Tensor, pad: int = 0) -> RowGradient:
        """Some of the rows, and rows without a gradient up to `pad`."""
        parts = (None if x is None else padded(x[rows], pad) for x in self)
        return RowGradient(*parts)  # type: ignore[arg-type]


def gradient(
    raw: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    up: RowGradient,
    map: LogitMap,
    out: torch.Tensor,
) -> torch.Tensor:
    """The gradient of a tile's raw logits [R, C] (overwritten), into `out` (which may be raw)."""
    cols = raw.shape[1]
    z, slope = mapped(raw, bias, map, slope=True)
    log_p = z.sub_(up.peak[:, None]).sub_(up.log_sum[:, None])
    if up.slope is None:
        dz = log_p.exp_().mul_(-up.offset[:, None])
    else:
        p = log_p.clamp_(min=FLOOR).exp()
        dz = log_p.mul_(-up.slope[:, None]).sub_(up.offset[:, None]).mul_(p)
    here = (target >= 0) & (target < cols)
    at = target.clamp(0, cols - 1)[:, None]
    dz.scatter_(1, at, torch.where(here[:, None], up.at_target[:, None], dz.gather(1, at)))
    if slope is not None:
        dz.mul_(slope)
    return dz if out is dz else out.copy_(dz)


class Accumulator:
    """The gradient of an [n, D] tensor, summed piece by piece.

    A piece is opened, added to, and closed. Where the gradient is as wide as the sums, and in the
    order of the pieces, it is opened itself. Else, with `whole`, pieces may be opened again: the
    sums live in a float32 buffer until `finish`. Without it a piece is rounded when it is closed.
    """

    def __init__(
        self,
        like: torch.Tensor,
        wide: torch.dtype,
        *,
        whole: bool,
        index: torch.Tensor | None = None,
        grad: torch.Tensor | None = None,
        once: bool = False,
        moved: bool = False,
    ):
        """index: pieces count in rows of `index`, which says where they lie in the gradient.
        grad: the gradient to write to, when several accumulators share it.
        once: every piece is opened once, holds anything, and is written before it is added to.
        moved: instead of a buffer the gradient itself, as wide, holds the sums of an index."""
        if grad is None:
            # rows in any order are written slowly to pages that the system has yet to zero
            new = torch.empty if once and index is None else torch.zeros
            grad = new(like.shape, dtype=like.dtype, device=like.device)
        self.grad, self.index, self.wide, self.once = grad, index, wide, once
        self.direct = grad.dtype == wide and index is None
        self.moved = moved and whole and not self.direct
        self.unit: torch.Tensor | None = None  # multiplies the sums before they are rounded
        self.buffer: torch.Tensor | None = None
        if whole and not self.direct and not self.moved:
            n = like.shape[0] if index is None else index.numel()
            self.buffer = torch.zeros(n, like.shape[1], dtype=wide, device=like.device)

    def open(self, s: slice) -> torch.Tensor:
        """The sums of rows s, to be added to in place."""
        if self.direct:
            return self.grad[s]
        if self.buffer is not None:
            return self.buffer[s]
        if self.moved and self.index is not None:
            return self.grad[self.index[s]]
        shape = (s.stop - s.start, self.grad.shape[1])
        new = torch.empty if self.once else torch.zeros
        return new(shape, dtype=self.wide, device=self.grad.device)

    def close(self, s: slice, piece: torch.Tensor) -> None:
        """Rows s are complete; nothing to do where the sums stay open until `finish`."""
        if not self.direct and self.buffer is None:
            self._round(s, piece)

    def skip(self, s: slice) -> None:
        """Nothing is added to rows s."""
        if self.once:
            self.grad[s if self.index is None else self.index[s]] = 0

    def _round(self, s: slice, piece: torch.Tensor) -> None:
        if self.unit is not None and not self.moved:
            piece *= self.unit
        if self.index is None:
            self.grad[s] = piece
        else:
            self.grad.index_copy_(0, self.index[s], piece.to(self.grad.dtype))

    def finish(self, step: int) -> torch.Tensor:
        """The gradient."""
        if self.buffer is not None:
            for s in spans(self.buffer.shape[0], step):
                self._round(s, self.buffer[s])
        elif (self.direct or self.moved) and self.unit is not None:
            self.grad *= self.unit
        return self.grad


@dataclass
class Gradients:
    """Accumulators of dH, dW and dbias; None where no gradient is required."""

    dh: Accumulator | None
    dw: Accumulator | None
    db: torch.Tensor | None

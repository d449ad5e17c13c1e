"""Gradients summed in float32 and rounded once."""

from __future__ import annotations

import torch

from riskpo_kernels.core.matmul import spans


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

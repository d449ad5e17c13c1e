"""A product of low rank beside the head: columns that hidden states and head get, tile by tile.

    raw = h W^T + u B^T      u = factor h A^T, float32 or wider

One product gives both terms: of [h, u] with [W, B]. Where operands are 16 bits wide, what their
rounding would lose has columns of its own, so that u B^T is right to about 2^-16 of itself:

    u B^T = u1 B1^T + u2 B1^T + u1 B2^T      u1 = round(u), u2 = round(u - u1), B alike
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def halves(x: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """x as one part where the products' dtype holds it, else two whose sum is x, nearly."""
    first = x.to(dtype)
    if torch.promote_types(x.dtype, dtype) == dtype:
        return [first]
    return [first, (x - first.to(x.dtype)).to(dtype)]


def filled(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """x with columns of zeros up to a multiple."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % multiple))


@dataclass(frozen=True)
class LowRank:
    """u [N, r] of all rows of hidden, b [V, r] of all columns; dtype of the products' operands."""

    u: torch.Tensor
    b: torch.Tensor
    dtype: torch.dtype

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        """Which halves of u and of B are multiplied."""
        both = [
            range(1 if torch.promote_types(x.dtype, self.dtype) == self.dtype else 2)
            for x in (self.u, self.b)
        ]
        return [(i, j) for i in both[0] for j in both[1] if i + j < 2]

    @property
    def width(self) -> int:
        """A multiple of 16 for 16-bit operands, whose rows then begin where wide loads can."""
        columns = len(self._pairs) * self.u.shape[1]
        return columns + -columns % self._multiple

    @property
    def _multiple(self) -> int:
        return 16 if self.dtype.itemsize == 2 else 1

    def beside_hidden(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """[R, width]"""
        parts = halves(self.u[rows], self.dtype)
        return filled(torch.cat([parts[i] for i, _ in self._pairs], 1), self._multiple)

    def beside_weight(self, columns: slice | torch.Tensor) -> torch.Tensor:
        """[C, width]"""
        parts = halves(self.b[columns], self.dtype)
        return filled(torch.cat([parts[j] for _, j in self._pairs], 1), self._multiple)

    def of_u(self, sums: torch.Tensor) -> torch.Tensor:
        """The gradient [N, r] of u in that of beside_hidden: of its first half, which is whole."""
        parts = sums.split(self.u.shape[1], 1)
        return torch.stack([parts[k] for k, (i, _) in enumerate(self._pairs) if i == 0]).sum(0)

    def of_b(self, sums: torch.Tensor) -> torch.Tensor:
        """The gradient [V, r] of B in that of beside_weight."""
        parts = sums.split(self.u.shape[1], 1)
        return torch.stack([parts[k] for k, (_, j) in enumerate(self._pairs) if j == 0]).sum(0)

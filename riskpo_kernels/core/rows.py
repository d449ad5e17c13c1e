"""What is known of a row of logits: how they are made, softmax statistics, their gradient.

lm_head/softmax.py has the mathematics; kernels/ has it in Triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BLOCK = 128  # columns of a vocabulary block, whose gradient is kept or dropped as one
IGNORED = -(2**62)  # a target that says: do not read this row
FLOOR = -1000.0  # of log-probabilities: exp is 0 there in every dtype, and 0 * FLOOR is not NaN


class LogitMap(NamedTuple):
    """z = softcap(scale * (raw + bias)) / temperature; temperature is a float or one per row."""

    scale: float
    softcap: float | None
    temperature: float | torch.Tensor

    def of(self, rows: slice | torch.Tensor) -> LogitMap:
        """The map of some of the rows."""
        if isinstance(self.temperature, torch.Tensor):
            return self._replace(temperature=self.temperature[rows])
        return self

    def slope(self, z: torch.Tensor) -> torch.Tensor:
        """Derivative of the softcap where z [R] came out."""
        assert self.softcap is not None
        return (1 - (z * self.temperature / self.softcap).square()).clamp(min=0.0)

    def factors(self) -> tuple[float, float, torch.Tensor | None]:
        """(inner, outer, T): z = outer raw / T, with a softcap outer tanh(inner raw) / T; T is one
        per row, or None and a part of outer."""
        inner = 1.0 if self.softcap is None else self.scale / self.softcap
        outer = self.scale if self.softcap is None else self.softcap
        if isinstance(self.temperature, torch.Tensor):
            return inner, outer, self.temperature
        return inner, outer / self.temperature, None

    def column(self) -> float | torch.Tensor:
        """The temperature, shaped to broadcast over a tile."""
        t = self.temperature
        return t[:, None] if isinstance(t, torch.Tensor) else t


class RowState(NamedTuple):
    """m, s, u, z_t of every row; u is None when no entropy is wanted."""

    m: torch.Tensor
    s: torch.Tensor
    u: torch.Tensor | None
    zt: torch.Tensor

    @staticmethod
    def new(n: int, entropy: bool, like: torch.Tensor, dtype: torch.dtype) -> RowState:
        def full(value: float) -> torch.Tensor:
            return torch.full((n,), value, dtype=dtype, device=like.device)

        return RowState(full(-torch.inf), full(0), full(0) if entropy else None, full(-torch.inf))

    def of(self, rows: slice | torch.Tensor) -> RowState:
        """Some of the rows: views for a slice, copies for an index."""
        return RowState(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]

    def put(self, rows: slice, part: RowState) -> None:
        """The state of these rows; rows of `part` beyond them are padding."""
        for x, y in zip(self, part, strict=True):
            if x is not None and y is not None:
                x[rows] = y[: rows.stop - rows.start]


class RowStats(NamedTuple):
    """What the results and the backward need; lse = peak + log_sum."""

    logprob: torch.Tensor
    entropy: torch.Tensor | None
    peak: torch.Tensor
    log_sum: torch.Tensor

    def of(self, rows: slice | torch.Tensor) -> RowStats:
        return RowStats(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


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

    def of(self, rows: slice | torch.Tensor) -> RowGradient:
        return RowGradient(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


def relative_to(m: torch.Tensor, part: RowState) -> tuple[torch.Tensor, torch.Tensor | None]:
    """s and u of a part of the columns, as if its maximum had been m, that of all of them."""
    anchor = torch.where(m == -torch.inf, 0.0, m)  # -inf - -inf is NaN
    shift = (part.m - anchor).clamp_(min=FLOOR)
    keep = torch.exp(shift)
    return part.s * keep, None if part.u is None else keep * (part.u + part.s * shift)


SHARE = 20  # at most memory_mib / SHARE stays allocated between the forward and the backward


def kept_columns(rows: int, vocab: int, itemsize: int, memory_mib: float) -> int:
    """How many columns' logits are kept; whole blocks, or all columns."""
    fitting = int(memory_mib * 2**20 / SHARE) // (itemsize * torch.sym_max(rows, 1))
    return torch.sym_min(vocab, fitting // BLOCK * BLOCK)


class KeptLogits(NamedTuple):
    """Raw logits [N, K] of the first K columns, which the backward need not compute again; row i
    is row i of the hidden states.

    A small head's fit in a small part of the workspace, whole or in part, in float32 (float64).
    Only the torch backend on a CPU keeps them: there the product is the cost; on a GPU this little
    is recomputed in microseconds.
    """

    raw: torch.Tensor

    def known(self, v: slice) -> int:
        """How many of the columns v, from the first on."""
        return min(max(self.raw.shape[1] - v.start, 0), v.stop - v.start)

    def save(self, rows: torch.Tensor | slice, v: slice, raw: torch.Tensor) -> None:
        """Keep what fits of a tile of columns v."""
        known = self.known(v)
        if known:
            self.raw[rows, v.start : v.start + known] = raw[:, :known]

    def load(self, rows: torch.Tensor | slice, v: slice, out: torch.Tensor) -> int:
        """Fill the known columns of a tile and say how many they are."""
        known = self.known(v)
        if known:
            columns = self.raw[:, v.start : v.start + known]
            if isinstance(rows, slice):
                out[:, :known] = columns[rows]
            else:
                torch.index_select(columns, 0, rows, out=out[:, :known])
        return known

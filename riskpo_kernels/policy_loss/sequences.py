"""Which token is in which sequence: sums, means and weights over sequences, and who gives what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from riskpo_kernels.core.process_groups import agree, sum_over

OP = "clipped_surrogate"


@dataclass(frozen=True)
class Sequences:
    """Which of the S sequences each of the N flat tokens is in, and whether it counts. With a group
    every rank holds some of the tokens of the same sequences."""

    segment: torch.Tensor  # [N] int64
    counted: torch.Tensor  # [N] bool
    sizes: torch.Tensor  # [S] int64, tokens of each sequence on this rank
    lengths: torch.Tensor  # [S] int64, counted tokens of each sequence, over all ranks
    group: Any = None  # process group

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        mask: torch.Tensor | None,
        group: Any = None,
    ) -> Sequences:
        """From flat [N] (one sequence when there is no cu_seqlens) or padded [B, T] tokens."""
        if cu_seqlens is not None:
            sizes = cu_seqlens.long().diff()
        else:
            rows, width = (1, *x.shape)[-2:]
            sizes = torch.full((rows,), width, device=x.device)
        index = torch.arange(len(sizes), device=x.device)
        segment = index.repeat_interleave(sizes, output_size=x.numel())  # told: no sync
        counted = torch.ones_like(segment, dtype=torch.bool)
        counted = counted if mask is None else mask.reshape(-1) != 0
        lengths = torch.zeros_like(sizes).index_add(0, segment, counted.long())
        if group is not None:
            agree(OP, group, x.device, same={"sequences": len(sizes)})
            lengths = sum_over(group, lengths)
        return cls(segment, counted, sizes, lengths, group)

    def tokens(
        self, x: torch.Tensor, dtype: torch.dtype, *, per_token: bool = True
    ) -> torch.Tensor:
        """Values per token, or per sequence [S], as flat [N]; 0 where a token does not count,
        whatever stood there."""
        x = x.reshape(-1) if per_token else self.spread(x)
        return torch.where(self.counted, x.to(dtype), 0.0)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """[S] to flat [N]."""
        return x[self.segment]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Flat [N] to [S], over all ranks; one order of addition, where atomics would have many."""
        total = torch.segment_reduce(x, "sum", lengths=self.sizes, unsafe=True, initial=0)
        return total if self.group is None else sum_over(self.group, total)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Flat [N] to [S]; 0 for a sequence without counted tokens."""
        return self.sum(x) / self.lengths.clamp(min=1).to(x.dtype)

    def weight(self, dtype: torch.dtype, length: torch.Tensor | None = None) -> torch.Tensor:
        """Flat [N], 0 where not counted, else 1, or 1 / length of the token's sequence."""
        counted = self.counted.to(dtype)
        return counted if length is None else counted / self.spread(length.clamp(min=1).to(dtype))


def is_per_token(
    name: str,
    x: torch.Tensor,
    logprob: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    given: str | None,
    group: Any = None,
) -> bool:
    """Whether x has one value per token, not per sequence; `given` says so, else its shape.

    ValueError, on all ranks of a group, where S == N leaves both open. Without a group the two
    readings are one if every sequence is one token.
    """
    flat = logprob.dim() == 1
    if given is not None or (flat and cu_seqlens is None):
        return given != "sequence"
    count = logprob.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    per_sequence = x.shape == (count,)
    unclear = per_sequence and flat and count == len(logprob)
    if group is not None:
        unclear = bool(sum_over(group, torch.tensor(int(unclear), device=x.device)) > 0)
    elif unclear and cu_seqlens is not None:
        unclear = not bool((cu_seqlens.diff() == 1).all())
    if unclear:
        raise ValueError(
            f"{OP}: got {name} {list(x.shape)} for as many sequences as tokens; expected a word. "
            f"Pass {name}_per='sequence' or {name}_per='token'."
        )
    return not per_sequence

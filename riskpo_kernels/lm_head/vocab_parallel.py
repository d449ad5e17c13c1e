"""A head whose vocabulary is spread over the ranks of a group: what crosses between them.

Every rank holds the columns [offset, offset + V_r) and all rows. A row's softmax state over its
own columns, (m, s, u, z_t) of core/softmax.py, becomes the state over all of them by

    M   = max_r m_r                           e_r = exp(m_r - M)
    s   = sum_r s_r e_r                       u   = sum_r (u_r + s_r (m_r - M)) e_r
    z_t = max_r z_t,r                         -inf where the target is another rank's

From then on every rank knows the row as a single one would: its gradient of the logits is right
without a further word, dW and dbias stay where they are, and dH is the sum over ranks.

collective                    when                             size
all_gather of 8 integers      once in the forward              shards' sizes; do the ranks agree?
all_reduce max (m, z_t)       once a chunk of rows             2 numbers a row
all_reduce sum (s, u)         once a chunk of rows             1 number a row, 2 with an entropy
all_reduce sum dH             once in the backward             [rows with a coefficient, D] float32

Chunks of rows are planned for the widest shard, so all ranks have as many; an empty shard takes
part in every collective. Blocks of columns are dropped rank by rank (core/softmax.py); the
mass that a row may lose is divided by the number of ranks, so its bound is that of a single rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from riskpo_kernels.core.matmul import Options, wide_of
from riskpo_kernels.core.process_groups import agree, group_called, max_over, sum_over
from riskpo_kernels.core.softmax import RowState, relative_to


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary."""

    group: Any
    offset: int  # global id of this rank's first column
    total: int  # columns of all ranks
    widest: int  # columns of the largest shard
    ranks: int

    @staticmethod
    def find(
        op: str, group: Any, weight: torch.Tensor, same: dict[str, int | torch.Tensor]
    ) -> VocabShard:
        """Ask every rank for the columns it holds; `same` must be equal on all of them."""
        sizes = agree(op, group, weight.device, same=same, own=weight.shape[0])
        offset = sum(sizes[: group.rank()])
        return VocabShard(group, offset, sum(sizes), max(sizes), len(sizes))

    def merge(self, state: RowState) -> None:
        """The state over this rank's columns becomes, in place, the state over all of them."""
        peaks = max_over(self.group, torch.stack((state.m, state.zt)))
        parts = [x for x in relative_to(peaks[0], state) if x is not None]
        sums = sum_over(self.group, torch.stack(parts))
        state.m.copy_(peaks[0])
        state.zt.copy_(peaks[1])
        state.s.copy_(sums[0])
        if state.u is not None:
            state.u.copy_(sums[1])


def find_shard(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, o: Options
) -> VocabShard | None:
    """This rank's, of linear_logprob's head; None without a group."""
    if not o.group:
        return None
    same: dict[str, int | torch.Tensor] = {  # what the number of collectives hangs on, and more
        "rows": target.shape[0],
        "hidden width": hidden.shape[1],
        "bytes of a sum": wide_of(hidden, weight).itemsize,
        "sum of the targets": target.sum(),
        "return_entropy": o.return_entropy,
        "triton": o.backend == "triton",
        "memory_mib * 1024": int(o.memory_mib * 1024),
    }
    return VocabShard.find("linear_logprob", group_called(o.group), weight, same)

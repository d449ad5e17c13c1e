"""Two heads over the same rows, student and teacher, and their logits tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from riskpo_kernels.core.softmax import LogitMap, mapped
from riskpo_kernels.lm_head.tiles import Head, products_of

OP = "linear_divergence"
KINDS = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class Words:
    """What is not a tensor."""

    kind: str
    beta: float
    temperature: float
    scale: float
    softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    tail_eps: float
    group: str
    memory_mib: float
    keep: bool  # a backward may follow


class Pair(NamedTuple):
    """Both heads over the live rows."""

    student: Head
    teacher: Head

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(products_of(self.student).wide, products_of(self.teacher).wide)

    def logits(
        self, r: slice | torch.Tensor, v: slice
    ) -> Iterator[tuple[torch.Tensor, Any, Any, Any]]:
        """z [R, C], slope, hidden states and weight of either side."""
        for head in self:
            products = products_of(head)
            h, w = head.take(r, products.dtype), head.weight[v].to(products.dtype)
            raw = h.new_empty(h.shape[0], w.shape[0], dtype=products.wide)
            products.into(raw, h, w.T)
            z, slope = mapped(raw, head.bias_of(v, products.wide), head.map_of(r), slope=True)
            yield z.to(self.wide), slope, h, w


def pair_of(tensors: tuple[Any, ...], w: Words) -> Pair:
    hidden, weight, bias, t_hidden, t_weight, t_bias, mask, row_temperature = tensors
    keep = None if mask is None else mask.nonzero()[:, 0]
    heads = []
    for h, wt, b, scale, cap in (
        (hidden, weight, bias, w.scale, w.softcap),
        (t_hidden, t_weight, t_bias, w.teacher_scale, w.teacher_softcap),
    ):
        n = h.shape[0] if keep is None else keep.numel()
        t: float | torch.Tensor = w.temperature
        if row_temperature is not None:
            wide = torch.promote_types(torch.promote_types(h.dtype, wt.dtype), torch.float32)
            rows = row_temperature if keep is None else row_temperature[keep]
            t = rows.to(wide)
        heads.append(Head(h, wt, b, keep, h.new_empty(n), LogitMap(scale, cap, t)))
    return Pair(*heads)

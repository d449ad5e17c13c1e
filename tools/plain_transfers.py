"""A stand-in for the copies of activation offloading, for machines without CUDA."""

from __future__ import annotations

import weakref
from typing import Any

import torch


class PlainTransfers:
    """Copies within one memory, done at once, for a model that is on the CPU itself.

    They gain nothing: they let the same code be tested, and its copies be measured, without CUDA.
    `most` is the largest number of bytes that waited together; from a GPU they would be the CPU's.
    """

    def __init__(self) -> None:
        self.most = self._waiting = 0

    def out(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        on_cpu = tensor.clone()
        self._count(on_cpu.nbytes)
        weakref.finalize(on_cpu, self._count, -on_cpu.nbytes)
        return on_cpu, None

    def back(self, on_cpu: torch.Tensor, sent: Any) -> tuple[torch.Tensor, Any]:
        return on_cpu.clone(), None

    def wait(self, ticket: Any) -> None:
        """Nothing to wait for."""

    def _count(self, size: int) -> None:
        self._waiting += size
        self.most = max(self.most, self._waiting)

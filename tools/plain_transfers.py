"""A stand-in for the copies of activation offloading, for machines without CUDA."""

from __future__ import annotations

import weakref
from typing import Any

import torch


class PlainTransfers:
    """Copies within one memory, done at once, for a model that is on the host itself.

    They gain nothing: they let the same code be tested, and its copies be measured, without CUDA.
    `most` is the largest number of bytes that waited together; from a GPU they would be the host's.
    """

    def __init__(self) -> None:
        self.most = self._waiting = 0

    def out(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        host = tensor.clone()
        self._count(host.nbytes)
        weakref.finalize(host, self._count, -host.nbytes)
        return host, None

    def back(self, host: torch.Tensor, sent: Any) -> tuple[torch.Tensor, Any]:
        return host.clone(), None

    def wait(self, ticket: Any) -> None:
        """Nothing to wait for."""

    def _count(self, size: int) -> None:
        self._waiting += size
        self.most = max(self.most, self._waiting)

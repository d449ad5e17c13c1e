"""Gradient checkpointing that keeps layer inputs in CPU memory between forward and backward.

torch's checkpoint saves one tensor per layer, its input [1, T, D]. That tensor is copied to pinned
CPU memory, on its own stream, while the layer computes, and copied back during the backward of the
layer above. At most IN_FLIGHT copies to the CPU are under way at a time. The device thus holds
IN_FLIGHT + 2 layer inputs, whatever the number of layers. Beside the input, torch 2.11 saves an
empty tensor, which stays where it is.

Pinned buffers come from torch's caching host allocator, which rounds each up to a power of two.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from riskpo.config import IN_FLIGHT


class Transfers(Protocol):
    """Asynchronous copies between the device and the CPU."""

    def out(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """(CPU copy, ticket); the copy may be read, and `tensor` freed, after wait(ticket)."""

    def back(self, on_cpu: torch.Tensor, sent: Any) -> tuple[torch.Tensor, Any]:
        """(device copy, ticket) of a CPU copy whose own ticket was `sent`."""

    def wait(self, ticket: Any) -> None:
        """Make computation queued from now on wait for a copy."""


class CudaTransfers:
    """Transfers on two CUDA streams, one for each direction. Tickets are events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.outward, self.homeward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def out(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        on_cpu = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.outward.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.outward):
            on_cpu.copy_(tensor, non_blocking=True)
            return on_cpu, self.outward.record_event()

    def back(self, on_cpu: torch.Tensor, sent: Any) -> tuple[torch.Tensor, Any]:
        # Allocated on the computing stream, which may still be reading what was there before.
        tensor = torch.empty(on_cpu.shape, dtype=on_cpu.dtype, device=self.device)
        self.homeward.wait_stream(torch.cuda.current_stream(self.device))
        self.homeward.wait_event(sent)
        with torch.cuda.stream(self.homeward):
            tensor.copy_(on_cpu, non_blocking=True)
            # The computing stream waits only when it gets there; until then nothing may free it.
            tensor.record_stream(self.homeward)
            return tensor, self.homeward.record_event()

    def wait(self, ticket: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket)


class _Parked:
    """One layer's input on the CPU, and the copy on its way back, if any."""

    def __init__(self, on_cpu: torch.Tensor, sent: Any, below: _Parked | None) -> None:
        self.on_cpu, self.sent = on_cpu, sent
        self.below = None if below is None else weakref.ref(below)
        self.arriving: tuple[torch.Tensor, Any] | None = None


class CpuCheckpoints:
    """The checkpoint function of every layer of one model; its graph owns what is parked."""

    def __init__(self, transfers: Transfers) -> None:
        self.transfers = transfers
        self._leaving: deque[tuple[torch.Tensor, Any]] = deque()
        self._last: weakref.ref[_Parked] | None = None

    def __call__(self, function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """As torch.utils.checkpoint.checkpoint, non-reentrant."""
        with saved_tensors_hooks(self._park, self._fetch):
            return checkpoint(function, *inputs, use_reentrant=False, **options)

    def _park(self, tensor: torch.Tensor) -> _Parked | torch.Tensor:
        if not tensor.numel():
            return tensor
        while len(self._leaving) >= IN_FLIGHT:
            self.transfers.wait(self._leaving.popleft()[1])
        on_cpu, ticket = self.transfers.out(tensor)
        self._leaving.append((tensor, ticket))  # kept alive until its copy is done
        parked = _Parked(on_cpu, ticket, self._last() if self._last else None)
        self._last = weakref.ref(parked)
        return parked

    def _fetch(self, parked: _Parked | torch.Tensor) -> torch.Tensor:
        if isinstance(parked, torch.Tensor):
            return parked
        while self._leaving:
            self.transfers.wait(self._leaving.popleft()[1])
        self._last = None  # a forward that comes after this backward is another graph
        tensor, ticket = parked.arriving or self.transfers.back(parked.on_cpu, parked.sent)
        parked.arriving = None
        below = parked.below() if parked.below else None
        if below is not None and below.arriving is None:
            below.arriving = self.transfers.back(below.on_cpu, below.sent)
        self.transfers.wait(ticket)
        return tensor

"""Which implementation runs, and why. `auto` never falls back in silence.

backend      runs on                                   dtypes
triton       CUDA, compute capability 8.0 or newer;    bf16, fp16, fp32
             the Triton interpreter on a CPU           fp32, fp16
torch        any device                                bf16, fp16, fp32, fp64
reference    any device, materialises everything       bf16, fp16, fp32, fp64

linear_divergence's products are PyTorch's: its kernels run bf16 in the interpreter too.
clipped_surrogate is one pass of PyTorch under each of the first two names.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from dataclasses import dataclass

import torch

from riskpo_kernels.core.checks import check_choice, reject

BACKENDS = ("auto", "triton", "torch", "reference")
TRITON_OPS = ("linear_logprob", "logits_logprob", "linear_divergence")
POLICY_LOSS = "clipped_surrogate", "torch", "elementwise: one pass of PyTorch on every device"
log = logging.getLogger("riskpo_kernels")


@dataclass(frozen=True)
class BackendChoice:
    """What `auto` picks for one op on one device."""

    op: str
    device: str
    backend: str
    reason: str


class BackendReport(tuple[BackendChoice, ...]):
    """The rows of `backend_report()`; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(f"{c.op:<18} {c.device:<8} {c.backend:<8} {c.reason}" for c in self)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the Triton kernels cannot run there, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype == torch.float64:
        return "the Triton kernels compute in float32 and the input is float64"
    if device.type == "cuda":
        capability = _capability(device.index if device.index is not None else 0)
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        return None
    if not _interpreting():
        return f"device {device.type} is not CUDA and TRITON_INTERPRET=1 is not set"
    if dtype == torch.bfloat16:
        return "the Triton interpreter computes wrong bfloat16 products"
    return None


def choose(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, obstacle: str | None = None
) -> str:
    """Resolve `backend` for `op`; an explicit one that cannot run raises ValueError. obstacle: why
    the Triton kernels cannot take this call, whatever the machine."""
    check_choice(op, "backend", backend, BACKENDS)
    if backend in ("torch", "reference"):
        return backend
    obstacle = obstacle or why_not_triton(device, dtype)
    if backend == "triton":
        if obstacle is not None:
            reject(op, "backend='triton'", "a machine where it can run", f"Here {obstacle}.")
        return "triton"
    choice = _auto(obstacle, device)
    _log_once(op, device.type, *choice)
    return choice[0]


def _auto(obstacle: str | None, device: torch.device) -> tuple[str, str]:
    if obstacle is not None:
        return "torch", obstacle
    if device.type != "cuda":
        return "torch", "the Triton interpreter is for tests; the torch backend is faster on a CPU"
    return "triton", "CUDA device with compute capability 8.0 or newer"


@functools.cache
def _log_once(op: str, device: str, backend: str, reason: str) -> None:
    log.info("%s on %s: backend %s (%s)", op, device, backend, reason)


def backend_report() -> BackendReport:
    """What `backend="auto"` picks on this machine for each op, and why.

    Returns a tuple of rows (op, device, backend, reason) that prints as a table. Devices listed:
    the CPU and every visible CUDA device, for bfloat16 inputs.
    """
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    rows = [
        BackendChoice(op, str(device), *_auto(why_not_triton(device, torch.bfloat16), device))
        for op in TRITON_OPS
        for device in devices
    ]
    op, backend, reason = POLICY_LOSS
    return BackendReport(rows + [BackendChoice(op, str(x), backend, reason) for x in devices])

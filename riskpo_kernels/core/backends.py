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

from dataclasses import dataclass

import torch

from riskpo_kernels.core.checks import auto_choice, why_not_triton

TRITON_OPS = ("linear_logprob", "logits_logprob", "linear_divergence")
POLICY_LOSS = "clipped_surrogate", "torch", "elementwise: one pass of PyTorch on every device"


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


def backend_report() -> BackendReport:
    """What `backend="auto"` picks on this machine for each op, and why.

    Returns a tuple of rows (op, device, backend, reason) that prints as a table. Devices listed:
    the CPU and every visible CUDA device, for bfloat16 inputs.
    """
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    rows = [
        BackendChoice(op, str(device), *auto_choice(why_not_triton(device, torch.bfloat16), device))
        for op in TRITON_OPS
        for device in devices
    ]
    op, backend, reason = POLICY_LOSS
    return BackendReport(rows + [BackendChoice(op, str(x), backend, reason) for x in devices])

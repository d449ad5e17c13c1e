"""What a benchmark module offers: callables with the facts that a fair table needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from riskpo_kernels import backend_report


def anywhere(inputs: dict[str, Any]) -> str | None:
    """The obstacle of a provider that runs everywhere."""
    return None


@dataclass(frozen=True)
class Provider:
    """`run` takes a module's inputs() as keywords and does the whole of what is timed.

    kind: "ours", "plain" (PyTorch without a library) or "peer".
    per_token: returns per-token log-probs; the others are listed in a table of their own.
    why_not: inputs -> the reason why it cannot run on them, or None.
    backend: inputs -> which implementation really runs.
    units: (sizes, facts) -> products of N D V that it executes, by its cost formula (None for
        ours, whose launches are counted); facts are
        those of the timed rows (active_share).
    logits_in, sums_in: the dtype to which logits are rounded before the softmax, and the one in
        which dW is summed over chunks of tokens; "inputs" for that of the inputs, None if unknown.
    """

    run: Callable[..., Any]
    kind: str = "peer"
    per_token: bool = True
    why_not: Callable[[dict[str, Any]], str | None] = anywhere
    backend: Callable[[dict[str, Any]], str] = lambda inputs: "torch"
    units: Callable[[dict[str, Any], dict[str, Any]], float] | None = None
    slow_start: bool = False  # compiles for long: asked for by --compile, or by the case
    logits_in: str | None = None
    sums_in: str | None = None

    def __call__(self, **inputs: Any) -> Any:
        return self.run(**inputs)


def device_of(inputs: dict[str, Any]) -> torch.device:
    """Where the inputs live."""
    return next(x.device for x in inputs.values() if isinstance(x, torch.Tensor))


def auto_backend(op: str) -> Callable[[dict[str, Any]], str]:
    """What `backend="auto"` resolves to for the op on the inputs' device."""

    def backend(inputs: dict[str, Any]) -> str:
        device = device_of(inputs)
        name = f"cuda:{device.index or 0}" if device.type == "cuda" else str(device)
        for choice in backend_report():
            if choice.op == op and choice.device == name:
                return choice.backend
        return "torch"

    return backend


def too_large(inputs: dict[str, Any], bytes_needed: float) -> str | None:
    """The reason when a tensor set of that size does not fit beside the inputs."""
    if device_of(inputs).type == "cuda":
        free = torch.cuda.mem_get_info()[0]
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    else:
        free = _available_memory()
    if bytes_needed <= free:
        return None
    return f"needs {bytes_needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


def _available_memory() -> float:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            kib = next(x.split()[1] for x in lines if x.startswith("MemAvailable"))
        return float(kib) * 1024
    except (OSError, StopIteration):
        return float("inf")

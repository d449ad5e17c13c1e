"""Peak memory of a stretch of a run: what the device allocated, or how far the process grew."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PAGE = 4096  # bytes, or more
RESET_PEAK = "5"  # of VmHWM, by proc(5)


class PeakMeter:
    """Starts at what is allocated now, with all weights of `model` in memory.

    On the CPU it is the process' resident set (Linux only), which follows the tensors only as far
    as malloc gives memory back. With MALLOC_MMAP_THRESHOLD_=65536 in the environment it gives
    tensors of that size back at once; without it glibc keeps freed blocks, and the peak may come
    out higher.
    """

    def __init__(self, device: torch.device, model: torch.nn.Module | None = None) -> None:
        self.device = device
        if model is not None:
            page_in(model)
        self.start = self._now()
        self.restart()

    def restart(self) -> None:
        """Forget the peak so far; the start stays."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif CLEAR.exists():
            CLEAR.write_text(RESET_PEAK)

    def increase(self) -> int | None:
        """Bytes of the peak over the start; None where this machine does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.start
        return _resident("VmHWM") - self.start if STATUS.exists() else None

    def _now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _resident("VmRSS") if STATUS.exists() else 0


def page_in(model: torch.nn.Module) -> None:
    """Read one element of every page: weights mapped from a file are not in memory before."""
    for weight in model.parameters():
        if weight.device.type == "cpu" and not isinstance(weight, DTensor):  # a shard is a copy
            weight.detach().flatten()[:: PAGE // weight.itemsize].sum()


def _resident(name: str) -> int:
    found = re.search(name + r":\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))
    return int(found[1]) * 1024 if found else 0

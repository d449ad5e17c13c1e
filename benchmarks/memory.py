"""Peak memory of one call, minus what was there before and the gradients it had to return."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

MIB = 2**20


def peak_of(
    call: Callable[[], Any], given: dict[str, Any], device: str, *, warm: bool = False
) -> tuple[float, str]:
    """(MiB, how it was measured). The call runs twice, since libraries allocate on their first;
    once if a similar call came before (`warm`).

    Results are dropped before this returns; gradients of the inputs are cleared before each call
    and their bytes, the ones that the call had to return, are subtracted. (Also where the peak came
    before they were made: that flatters plain PyTorch, by at most their size.)
    """
    leaves = [x for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    parameters = [
        p for x in given.values() if isinstance(x, torch.nn.Module) for p in x.parameters()
    ]
    leaves += parameters
    _clear(leaves)
    if not warm:
        call()
        _clear(leaves)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return (peak - _gradient_bytes(leaves)) / MIB, "CUDA allocator peak"
    _trim()
    with _resident_peak() as found:
        kept = call()
    del kept
    return max(0.0, found.bytes - _gradient_bytes(leaves)) / MIB, found.how


def _clear(leaves: list[torch.Tensor]) -> None:
    for x in leaves:
        x.grad = None


def _gradient_bytes(leaves: list[torch.Tensor]) -> int:
    return sum(x.grad.numel() * x.grad.element_size() for x in leaves if x.grad is not None)


def _trim() -> None:
    """Return freed memory to the system, or the next call would reuse it unseen."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(key))


class _Peak:
    """Increase of resident memory in bytes, and how it was found."""

    bytes: float = float("nan")
    how: str = "not measurable here"


@contextlib.contextmanager
def _resident_peak():
    found = _Peak()
    if sys.platform != "linux":
        yield found
        return
    before = _status("VmRSS")
    if _reset_high_water():
        yield found
        found.bytes, found.how = _status("VmHWM") - before, "process high-water mark"
        return
    most, stop = [before], threading.Event()

    def sample() -> None:
        while not stop.is_set():
            most[0] = max(most[0], _status("VmRSS"))
            time.sleep(0.001)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
    found.bytes, found.how = most[0] - before, "resident memory, sampled each ms"


def _reset_high_water() -> bool:
    """Linux lets a process reset its own high-water mark; some sandboxes ignore it."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        return _status("VmHWM") < _status("VmRSS") + 2 * MIB
    except OSError:
        return False

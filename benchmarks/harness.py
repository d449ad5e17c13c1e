"""Runs one case of one module and returns its rows: time, memory, work and error of each provider.

A module offers CASES, inputs(**sizes, device), providers(), cost(**sizes) and, where there is
something to compare, truths(inputs) and errors(provider, inputs, truths). Sizes n, d, v make the
harness time the bare logits GEMM in the same run; multiples of it are the unit that travels.

    column                what it is
    median_ms, spread_ms  median and interquartile range over the repeats, after warm-up;
                          CUDA events with a cold L2 cache, or the wall clock on a CPU
    peak_mib              peak memory minus inputs and gradients of the inputs, these in the dtypes
                          that gradients_in names. CUDA: allocator peak. CPU: high-water mark of
                          the process (peak_how says which way)
    tflops                flops of the dense products any method needs, over the median
    units                 products of N D V that were executed (a dense one is 2): ours count their
                          launches, padding included; of others it is the cost formula
    logits_in, sums_in    dtypes of the logits before the softmax and of sums of dW over tokens
    errors_over           which part of the results was compared with float64

Multiples and units count all N rows, masked ones included.
"""

from __future__ import annotations

import functools
import gc
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from benchmarks import memory
from benchmarks.provider import Provider
from riskpo_kernels.core.matmul import counting

FIELDS = (
    "op",
    "case",
    "sizes",
    "provider",
    "kind",
    "per_token",
    "backend",
    "device",
    "median_ms",
    "spread_ms",
    "repeats",
    "gemm_ms",
    "gemm_multiple",
    "tflops",
    "gb_per_s",
    "peak_mib",
    "peak_how",
    "units",
    "logprob_error_nats",
    "entropy_error_nats",
    "loss_error",
    "dh_error",
    "dw_error",
    "gradient_error",
    "errors_over",
    "gradients_in",
    "logits_in",
    "sums_in",
    "entropy_nats",
    "active_share",
    "rows",
    "extras",
    "reason",
    "failed",
)
L2_FLUSH_BYTES = 2**28


@dataclass(frozen=True)
class Settings:
    """How a run measures."""

    device: str = "cpu"
    most_repeats: int = 5
    seconds_per_row: float = 3.0
    accuracy: bool = True
    compile: bool = False
    rows: str | None = None
    only: tuple[str, ...] = ()  # parts of provider names; empty: all
    skip: tuple[str, ...] = ()  # parts of provider names
    longest_call: float = float("inf")  # seconds, of a peer, judged by its time with fewer tokens
    deadline: float = float("inf")  # time.monotonic()
    left_out: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # who made the device unusable
    paces: dict[Any, float] = field(default_factory=dict)  # seconds per token, by case and provider

    def spent(self) -> bool:
        """Nothing more can be measured."""
        return bool(self.lost) or time.monotonic() > self.deadline

    def wants(self, provider: str, only: tuple[str, ...]) -> bool:
        """Whether the command line and the case ask for this provider."""
        asked = all(not parts or any(p in provider for p in parts) for parts in (self.only, only))
        return asked and not any(p in provider for p in self.skip)


def run_case(
    module: ModuleType, case: str, sizes: dict[str, Any], s: Settings, only: tuple[str, ...] = ()
) -> Iterator[dict[str, Any]]:
    """Rows of the providers whose name contains a part in `only` (all without); those that cannot
    run say why."""
    op = module.__name__.rsplit("bench_", 1)[-1]
    takes_rows = "rows" in inspect.signature(module.inputs).parameters
    source = {"rows": s.rows} if takes_rows else {}
    given = module.inputs(**sizes, device=s.device, **source)
    facts = given.pop("_facts", {})
    common = {"op": op, "case": case, "sizes": sizes, "device": s.device, **facts}
    gemm = _gemm_ms(sizes, s)
    exact: Any = None
    for name, provider in module.providers().items():
        if not s.wants(name, only):
            continue
        if s.spent():
            s.left_out.append(f"{op} {case}: {name}")
            continue
        provider = as_provider(name, provider)
        row = dict.fromkeys(FIELDS) | common | {"provider": name, "extras": {}, "failed": False}
        row |= {"kind": provider.kind, "per_token": provider.per_token}
        row |= {k: _dtype_name(getattr(provider, k), sizes) for k in ("logits_in", "sums_in")}
        row["reason"] = _obstacle(provider, given, s) or _too_slow(name, provider, sizes, s)
        if row["reason"] is None:
            try:
                if s.accuracy and exact is None and hasattr(module, "truths"):
                    exact = module.truths(given)
                row |= _measure(module, provider, given, sizes, exact, facts, gemm, s)
                s.paces[_pace_of(name, sizes)] = row["median_ms"] / 1e3 / sizes.get("n", 1)
            except Exception as error:  # a peer may fail in any way; the row says how
                row["failed"] = not isinstance(error, (torch.OutOfMemoryError, NotImplementedError))
                row["reason"] = _one_line(error)
                if _device_lost(s):
                    s.lost.append(name)
            _clear(given)
        yield row


def as_provider(name: str, call: Callable[..., Any]) -> Provider:
    """A bare function of a module as a Provider."""
    if isinstance(call, Provider):
        return call
    ours = name.startswith("riskpo")
    backend = name.partition("-")[2] or "torch"
    return Provider(call, kind="ours" if ours else "plain", backend=lambda given: backend)


def _obstacle(provider: Provider, given: dict[str, Any], s: Settings) -> str | None:
    if provider.slow_start and not s.compile:
        return "compiles for long: ask with --compile"
    return provider.why_not(given)


def _pace_of(name: str, sizes: dict[str, Any]) -> Any:
    return name, *sorted((k, x) for k, x in sizes.items() if k != "n")


def _too_slow(name: str, provider: Provider, sizes: dict[str, Any], s: Settings) -> str | None:
    expected = s.paces.get(_pace_of(name, sizes), 0.0) * sizes.get("n", 1)
    if provider.kind != "peer" or expected <= s.longest_call:
        return None
    return f"one call would take {expected:.0f} s, at its pace with fewer tokens"


def _dtype_name(kept: str | None, sizes: dict[str, Any]) -> str | None:
    return sizes.get("dtype") if kept == "inputs" else kept


def _device_lost(s: Settings) -> bool:
    """After an illegal access every later call on the device fails."""
    if torch.device(s.device).type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _one_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:160]}"


def _measure(
    module: ModuleType,
    provider: Provider,
    given: dict[str, Any],
    sizes: dict[str, Any],
    exact: Any,
    facts: dict[str, Any],
    gemm: float | None,
    s: Settings,
) -> dict[str, Any]:
    row: dict[str, Any] = {"backend": provider.backend(given)}
    if exact is not None:
        row |= module.errors(provider, given, exact)
    _release()
    executed: list[int] = []

    def counted() -> Any:
        with counting() as work:
            result = provider(**given)
        executed.append(work.multiply_adds)
        return result

    warm = getattr(exact, "ran_whole", False)  # the errors were taken over one call like these
    peak, how = memory.peak_of(counted, given, s.device, warm=warm)
    row |= {"peak_mib": peak, "peak_how": how}
    results: list[Any] = []
    times = time_ms(lambda: results.append(provider(**given)), given, s, results.clear)
    row |= {"median_ms": statistics.median(times), "spread_ms": _spread(times)}
    row["repeats"] = len(times)
    if hasattr(module, "extras"):
        row["extras"] = module.extras(provider, given)
    work = module.cost(**sizes)
    seconds = row["median_ms"] / 1e3
    row |= {"tflops": work["flops"] / seconds / 1e12, "gb_per_s": work["bytes"] / seconds / 1e9}
    if gemm is not None:
        row |= {"gemm_ms": gemm, "gemm_multiple": row["median_ms"] / gemm}
    if provider.units is not None:
        row["units"] = provider.units(sizes, facts)
    elif executed[-1] and {"n", "d", "v"} <= sizes.keys():
        row["units"] = 2 * executed[-1] / (sizes["n"] * sizes["d"] * sizes["v"])
    return row


def _spread(times: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    quarters = statistics.quantiles(times, n=4, method="inclusive")
    return quarters[2] - quarters[0]


def _clear(given: dict[str, Any]) -> None:
    for x in given.values():
        if isinstance(x, torch.Tensor):
            x.grad = None


def _release() -> None:
    """Freed blocks go back to the device, so that one provider's leftovers do not help another."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def time_ms(
    call: Callable[[], Any],
    given: dict[str, Any],
    s: Settings,
    forget: Callable[[], None] = lambda: None,
) -> list[float]:
    """Times of repeated calls after one more warm-up; gradients are cleared between them."""
    cuda = torch.device(s.device).type == "cuda"
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=s.device) if cuda else None
    times: list[float] = []
    start = time.monotonic()
    warm_ups = 1 if cuda else 0  # on a CPU the memory measurement was one
    while True:
        _clear(given)
        if flush is not None:
            flush.zero_()
        times.append(_cuda_ms(call) if cuda else _wall_ms(call))
        forget()
        enough = time.monotonic() - start > s.seconds_per_row or s.spent()
        if len(times) >= s.most_repeats + warm_ups or (enough and len(times) > warm_ups):
            return times[warm_ups:]


def _wall_ms(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(call: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _gemm_ms(sizes: dict[str, Any], s: Settings) -> float | None:
    if not {"n", "d", "v", "dtype"} <= sizes.keys():
        return None
    return _cached_gemm_ms(sizes["n"], sizes["d"], sizes["v"], sizes["dtype"], s.device)


GEMM_ROWS = 8192


@functools.lru_cache(maxsize=256)
def _cached_gemm_ms(n: int, d: int, v: int, dtype: str, device: str) -> float:
    """Median of the bare logits GEMM: 8192-row chunks into one reused buffer, output in dtype."""
    kind = getattr(torch, dtype)
    h = torch.randn(n, d, device=device).to(kind)
    w = torch.randn(v, d, device=device).to(kind)
    buffer = torch.empty(min(n, GEMM_ROWS), v, dtype=kind, device=device)

    def product() -> None:
        for start in range(0, n, GEMM_ROWS):
            part = h[start : start + GEMM_ROWS]
            torch.mm(part, w.T, out=buffer[: part.shape[0]])

    repeats = 10 if torch.device(device).type == "cuda" else 3
    s = Settings(device=device, most_repeats=repeats, seconds_per_row=2.0)
    product()
    return statistics.median(time_ms(product, {}, s))

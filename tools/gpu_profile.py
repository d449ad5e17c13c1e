"""What the first minute on a GPU should settle: products and the forward's kernels, one by one.

    python -m tools.gpu_profile [--out FILE.json]        N 16,384, V 151,936, D 1536 and 4096, bf16
    python -m tools.gpu_profile --dry                    the same lines on a CPU, shrunk

Printed and written: measured milliseconds (median of 10) beside those that benchmarks/model.py
predicts, and the share of a forward's time in which no kernel ran. docs/kernel-notes.md has the
predictions in words.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.model import GPUS, USUAL, Call, dense_tile, ours_forward, total
from riskpo_kernels import linear_logprob
from riskpo_kernels.core.matmul import Products
from riskpo_kernels.core.softmax import BLOCK, LogitMap

REPEATS = 10


class Line(NamedTuple):
    """Milliseconds."""

    what: str
    d: int
    measured: float
    predicted: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the lines here, as JSON")
    parser.add_argument("--dry", action="store_true", help="on a CPU: the numbers mean nothing")
    options = parser.parse_args()
    (n, v), widths = ((64, 512), (32,)) if options.dry else (USUAL, (1536, 4096))
    device = torch.device("cpu" if options.dry else "cuda")
    name = "" if options.dry else torch.cuda.get_device_name(device)
    gpu = GPUS[next((key for key in GPUS if key in name), "H200")]
    lines: list[Line] = []
    for d in widths:
        lines += profile(Call(n, d, v, gpu), device)
    for line in lines:
        error = line.predicted / line.measured - 1
        said = f"{line.measured:9.3f} ms, predicted {line.predicted:9.3f} ({error:+.0%})"
        print(f"D {line.d:5} {line.what:42} {said}")
    if options.out:
        made = {"gpu": name, "n": n, "v": v, "lines": [line._asdict() for line in lines]}
        options.out.write_text(json.dumps(made, indent=1), encoding="utf-8")


def profile(c: Call, device: torch.device) -> list[Line]:
    """The lines of one width."""
    sixteen = torch.bfloat16 if device.type == "cuda" else torch.float32
    g = torch.Generator(device).manual_seed(0)
    h, w = (
        torch.randn(x, c.d, generator=g, device=device, dtype=sixteen) / c.d**0.5
        for x in (c.n, c.v)
    )
    target = torch.randint(c.v, (c.n,), generator=g, device=device)
    found: list[Line] = []

    def add(what: str, predicted: float, f: Callable[[], object]) -> None:
        found.append(Line(what, c.d, milliseconds(f, device), predicted))

    _products(c, h, w, add)
    if device.type == "cuda":
        from riskpo_kernels.kernels.head_forward import BlockStatistics, statistics

        out = BlockStatistics.new(c.n, -(-c.v // BLOCK), True, device)
        map = LogitMap(1.0, None, 1.0)
        add("statistics kernel", ours_forward(c)["statistics"],
            lambda: statistics(h, w, None, target, None, map, out, first=0, offset=0))  # fmt: skip

    def forward() -> None:
        with torch.no_grad():
            linear_logprob(h, w, target, return_entropy=True, ignore_index=None)

    add("forward", total(ours_forward(c)), forward)
    wall = found[-1].measured
    found.append(Line("forward, no kernel running", c.d, max(wall - busy(forward, device), 1e-6),
                      c.launches(4)))  # fmt: skip
    return found


def _products(
    c: Call,
    h: torch.Tensor,
    w: torch.Tensor,
    add: Callable[[str, float, Callable[[], object]], None],
) -> None:
    """Results of 16 bits and of float32; sums that a product adds to, or that are added to."""
    products, rows = Products(h.device, h.dtype, w.dtype), min(c.n, 4096)  # all would not fit
    part, one = h[:rows], c.gemm * rows / c.n
    short = h.new_empty(rows, c.v)
    add("a product, 16-bit result", one, lambda: torch.mm(part, w.T, out=short))
    wide = short.float()
    more = c.bytes(2 * rows * c.v)
    add("a product, float32 result", one + more, lambda: products.into(wide, part, w.T))
    r, k = dense_tile(c)
    dz, sums = short.new_ones(r, k), wide.new_zeros(k, c.d)
    one, moved = c.gemm * r * k / (c.n * c.v), c.bytes(8 * k * c.d)
    apart = functools.partial(products.add, sums, dz.T, h[:r], apart=True)
    add("a tile of dW, added apart", one + 2 * moved, apart)
    within = functools.partial(products.add, sums, dz.T, h[:r])
    add("a tile of dW, added in the product", one + moved, within)


def milliseconds(f: Callable[[], object], device: torch.device) -> float:
    """Of a call, the median; everything is compiled before."""
    f()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            f()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        else:
            f()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def busy(f: Callable[[], object], device: torch.device) -> float:
    """Milliseconds in which a kernel of one call runs (on a CPU: an operator)."""
    on_gpu = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as seen:
        f()
        if on_gpu:
            torch.cuda.synchronize()
    each = seen.key_averages()
    return 1e-3 * sum(x.self_device_time_total if on_gpu else x.self_cpu_time_total for x in each)


if __name__ == "__main__":
    main()

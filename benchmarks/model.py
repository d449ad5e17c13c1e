"""`python -m benchmarks.model`: milliseconds of one call as a GPU should take them. All predicted.

Nothing here has run on a GPU. A kernel's time is the sum of what it does, as if nothing overlapped
but a product and its own loads:

    products   FLOPs over GEMM_SHARE of the GPU's peak (gathered ones over GATHER_SHARE of that)
    pass       elements times instructions over ISSUE_SHARE of what the schedulers can issue
    bytes      over MEMORY_SHARE of the peak bandwidth
    launches   LAUNCH_US each

N rows, D wide, V columns; bf16 operands. share: of (row, 128 columns) pairs that are active. The
peers' rows are this model's reading of their source (docs/conformance.md has the versions), not
measurements of theirs: how many products, how many passes over the logits, how many bytes of each.

    python -m benchmarks.model --gpu H100 --n 8192 --d 4096 --v 128256 --share 0.02
    python -m benchmarks.model --page docs/predicted.md --picture docs/predicted.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

BLOCK = 128
GEMM_SHARE, MEMORY_SHARE = 0.80, 0.90  # 790 TFLOP/s and 4.3 TB/s were seen on an H200 by others
GATHER_SHARE = 0.5  # of a dense product's rate: an assumption
ISSUE_SHARE = 0.75  # an assumption
LAUNCH_US = 3.0
LANES = 128  # instructions that the four schedulers of a multiprocessor issue in a cycle
# Counted in the machine code of kernels/head_forward.py on sm_90, plain head: instructions outside
# the products per logit. Of a pass over logits in memory: the review of the kernels of others.
FORWARD = {True: 18.4, False: 16.7}  # with and without an entropy
PASS = 26.0


class GPU(NamedTuple):
    """Peaks of the vendor's data sheet: dense bf16, memory; multiprocessors, boost clock."""

    tflops: float
    terabytes: float
    sms: int
    ghz: float
    source: str


GPUS = {
    "A100": GPU(312, 2.04, 108, 1.41, "NVIDIA A100 80GB SXM data sheet"),
    "H100": GPU(989, 3.35, 132, 1.98, "NVIDIA H100 SXM data sheet"),
    "H200": GPU(989, 4.8, 132, 1.98, "NVIDIA H200 SXM data sheet"),
    "B200": GPU(2250, 8.0, 148, 1.96, "NVIDIA B200 (HGX) data sheet"),
    "MI300X": GPU(1307, 5.3, 304, 2.1, "AMD Instinct MI300X data sheet"),
}


@dataclass(frozen=True)
class Call:
    """One call, and how long its parts take on a GPU; every time in milliseconds."""

    n: int
    d: int
    v: int
    gpu: GPU
    share: float = 0.01
    entropy: bool = True
    memory_mib: float = 300.0

    def products(self, units: float, *, gathered: bool = False) -> float:
        """units: of N V D multiply-adds."""
        rate = self.gpu.tflops * GEMM_SHARE * (GATHER_SHARE if gathered else 1.0)
        return 2 * units * self.n * self.v * self.d / rate * 1e-9

    def bytes(self, count: float) -> float:
        return count / (self.gpu.terabytes * MEMORY_SHARE) * 1e-9

    def passes(self, instructions: float) -> float:
        """Of so many per logit."""
        rate = self.gpu.sms * LANES * self.gpu.ghz * ISSUE_SHARE * 1e6
        return instructions * self.n * self.v / rate

    def launches(self, count: float) -> float:
        return count * LAUNCH_US * 1e-3

    @property
    def gemm(self) -> float:
        """One bare product of the logits: what every ratio is of."""
        return self.products(1)


Parts = dict[str, float]


def ours_forward(c: Call) -> Parts:
    """kernels/live_rows.py, head_forward.py, finish_rows.py."""
    statistics = c.n * c.v / BLOCK * (12 if c.entropy else 8)
    weight = c.bytes(2 * c.v * c.d * -(-c.n // (16 * 128)))  # once per group of 16 row tiles
    product = max(c.products(1), weight)
    return {
        "statistics": product + c.passes(FORWARD[c.entropy]) + c.bytes(statistics) + c.launches(1),
        "finish": c.bytes(statistics) + c.launches(1),
        "live rows": c.bytes(16 * c.n) + c.launches(2),
    }


def padded(n: int) -> float:
    """Rows of 128-row tiles per active pair: through the two counts of the kernels' review, 1.05 at
    16,384 rows and 2.19 at 1,024."""
    return 1 + 1.14 * (1024 / n) ** 1.1


def ours_sparse(c: Call) -> Parts:
    """dz, dH and dW of the active pairs: three gathered products, their loads beside them, float32
    sums of dH and dW."""
    pairs = c.share * c.n * c.v / BLOCK * padded(c.n)
    moved = pairs * (12 * c.d + 6 * BLOCK)
    products = c.products(3 * c.share * padded(c.n), gathered=True)
    sums = c.bytes(10 * (c.v + c.n) * c.d)
    return {
        "active pairs": products + c.bytes(moved),
        "sums of dH and dW": sums,
        "lists": c.launches(20),
    }


def ours_dense(c: Call) -> Parts:
    """Every column, tile by tile: recompute, dz, dH, dW; the smaller sum lives in float32."""
    tile = c.memory_mib * 2**20
    sweeps = max(1.0, c.n * c.v * 6 / tile)
    wide = 16 * min(c.n, c.v) * c.d * sweeps  # mm, then add_: read, write, and the product's own
    return {
        "products": c.products(3),
        "dz": c.passes(PASS) + c.bytes(14 * c.n * c.v),
        "float32 sums": c.bytes(wide + 10 * (c.n + c.v) * c.d),
        "launches": c.launches(6 * sweeps),
    }


def staged(products: float, passes: float, moved: float, sums: float) -> Callable[[Call], Parts]:
    """A peer that keeps chunks of logits in memory: products, passes over them, bytes of each logit
    that move, and float32 or 16-bit sums of dW, as bytes of [V, D] per 1,024 rows."""

    def parts(c: Call) -> Parts:
        return {
            "products": c.products(products),
            "passes": c.passes(PASS * passes) + c.bytes(moved * c.n * c.v),
            "sums of dW": c.bytes(sums * c.v * c.d * max(1.0, c.n / 1024)),
            "launches": c.launches(8 * max(1.0, c.n / 1024)),
        }

    return parts


FORWARDS = {
    "riskpo_kernels": ours_forward,
    "TRL's fused head": staged(1, 1, 6, 0),  # 16-bit logits: written, read
}
BOTH = {
    "riskpo_kernels, sparse": lambda c: ours_forward(c) | ours_sparse(c),
    "riskpo_kernels, flat rows": lambda c: ours_forward(c) | ours_dense(c),
    "TRL's fused head": staged(4, 2, 16, 0.5),
    "Liger's fused linear cross entropy": staged(3, 1, 10, 0.5),
    "QuACK's linear cross entropy": staged(3, 1, 8, 0.0),
    "CCE (filtered cross entropy)": lambda c: {
        "products": c.products(2) + c.products(2 * c.share * padded(c.n)),
        "passes": c.passes(PASS + FORWARD[False]),
        "sums": c.bytes(10 * (c.v + c.n) * c.d),
    },
}


def total(parts: Parts) -> float:
    return sum(parts.values())


CASES = {
    "forward, D 1536": (FORWARDS, 1536, 0.01, 1.20),
    "forward, D 4096": (FORWARDS, 4096, 0.01, 1.10),
    "forward + backward, 1 % active, D 1536": (BOTH, 1536, 0.01, 1.50),
    "forward + backward, 1 % active, D 4096": (BOTH, 4096, 0.01, 1.50),
}
FLAT_GOAL = 4.7
N, V = 16384, 151936


def page() -> str:
    lines = [
        "# Predicted: what one call should take on a GPU",
        "",
        "**No number on this page was measured.** `python -m benchmarks.model` adds up products,",
        "passes over the logits, bytes and launches. The head of that file says how, and which",
        "rates are assumptions. No device result exists yet; `tools/gpu_session.sh` will make each",
        "row right or wrong.",
        "",
        f"N = {N:,}, V = {V:,}, bf16. Predicted milliseconds; in brackets, multiples of one bare",
        "product of the logits on the same GPU. Peers: this model's reading of their source. Cross",
        "entropies give neither an entropy nor log-probs with gradients of their own. CCE skips",
        "whole tiles; its row takes the share of pairs for that of tiles, which flatters it.",
        "",
    ]
    for case, (table, d, share, goal) in CASES.items():
        lines += [f"## {case}", "", f"| predicted | {' | '.join(GPUS)} |", "|---" * 6 + "|"]
        for name, parts in table.items():
            cells = []
            for gpu in GPUS.values():
                call = Call(N, d, V, gpu, share)
                cells.append(f"{total(parts(call)):.1f} ({total(parts(call)) / call.gemm:.2f})")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        call = Call(N, d, V, GPUS["H200"], share)
        goals = {"riskpo_kernels": goal, "riskpo_kernels, sparse": goal}
        goals["riskpo_kernels, flat rows"] = FLAT_GOAL
        said = [_against(name, total(table[name](call)) / call.gemm, goals) for name in table]
        lines += ["", "Goals on an H200: " + "; ".join(filter(None, said)) + ".", ""]
    lines += ["## By kernel, H200, D 1536, 1 % active", "", "| predicted | ms |", "|---|---|"]
    call = Call(N, 1536, V, GPUS["H200"])
    for name, ms in (ours_forward(call) | ours_sparse(call)).items():
        lines.append(f"| {name} | {ms:.2f} |")
    lines += ["", "![Predicted time against the share of active pairs](predicted.png)", ""]
    sources = "; ".join(f"{name}: {gpu.source}" for name, gpu in GPUS.items())
    return "\n".join([*lines, f"Rates: {sources}.", ""])


def _against(name: str, ratio: float, goals: dict[str, float]) -> str:
    """What is predicted beside the goal, where there is one."""
    if name not in goals:
        return ""
    word = "met" if ratio <= goals[name] else "missed"
    return f"{name} {goals[name]:.2f}, predicted {ratio:.3f}, {word}"


def draw(path: Path) -> None:
    """Forward + backward over the share of active pairs, H200."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shares = [0.0005 * 2 ** (i / 2) for i in range(20)]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), dpi=130, sharey=True, layout="constrained")
    for axis, d in zip(axes, (1536, 4096), strict=True):
        for name, parts in BOTH.items():
            calls = [Call(N, d, V, GPUS["H200"], share) for share in shares]
            axis.plot(shares, [total(parts(c)) / c.gemm for c in calls], label=name)
        axis.set_xscale("log")
        axis.set_title(f"predicted, H200, D = {d}, N = {N:,}, V = {V:,}", fontsize="small")
        axis.set_xlabel("share of active (row, 128 columns) pairs")
        axis.grid(color="#e3e7ea")
    axes[0].set_ylabel("predicted time, bare logits products")
    axes[0].set_ylim(0, 9)
    axes[1].legend(fontsize="x-small", frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    for name, default in (("n", N), ("d", 1536), ("v", V)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--share", type=float, default=0.01, help="of active pairs")
    parser.add_argument("--no-entropy", action="store_true")
    parser.add_argument("--page", type=Path, help="write the page here")
    parser.add_argument("--picture", type=Path, help="write the picture here, as PNG")
    given = parser.parse_args()
    if not 0 <= given.share <= 1 or min(given.n, given.d, given.v) < 1:
        parser.error("expected sizes of at least 1 and a share from 0 to 1")
    call = Call(given.n, given.d, given.v, GPUS[given.gpu], given.share, not given.no_entropy)
    print(f"{given.gpu}, N {call.n}, D {call.d}, V {call.v}, {call.share:.1%} active; predicted ms")
    print(f"{'one bare product of the logits':44} {call.gemm:8.2f}")
    for name, parts in BOTH.items():
        found = parts(call)
        print(f"{name:44} {total(found):8.2f} {total(found) / call.gemm:8.2f} x")
        for part, ms in found.items():
            print(f"    {part:40} {ms:8.2f}")
    if given.page:
        given.page.write_text(page(), encoding="utf-8")
    if given.picture:
        draw(given.picture)


if __name__ == "__main__":
    main()

"""`python -m benchmarks.model`: milliseconds of one call as a GPU should take them. All predicted.

Nothing here has run on a GPU (benchmarks/model_page.py shows what did). A kernel's time is the sum
of what it does, as if nothing overlapped but a product and its own loads:

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
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from riskpo_kernels.core.matmul import BACKWARD_TILE, plan_tiles
from riskpo_kernels.core.softmax import BLOCK
from riskpo_kernels.kernels.sparse_blocks import tile_rows
from riskpo_kernels.lm_head.backward import all_rows_at_once

GEMM_SHARE, MEMORY_SHARE = 0.80, 0.90  # 790 TFLOP/s and 4.3 TB/s were seen on an H200 by others
GATHER_SHARE = 0.5  # of a dense product's rate, in tiles of 128 rows: an assumption
ISSUE_SHARE = 0.75  # an assumption
LAUNCH_US = 3.0
LANES = 128  # instructions that the four schedulers of a multiprocessor issue in a cycle
# Instructions per logit in the machine code of sm_90, plain head, as the compile gate counts them:
# of the forward outside its product, with and without an entropy; more where one of the tile's rows
# has its target; of the dense backward's dz outside its product (kernels/dense_gradient.py); of a
# pass over logits in memory that makes a gradient. Of others a pass takes as many: an assumption.
FORWARD, AT_TARGETS = {True: 11.4, False: 9.8}, 9.1
DENSE, PASS = 13.1, 26.0


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

    def products(self, units: float, *, gathered: int = 0) -> float:
        """units: of N V D multiply-adds; gathered: rows of a tile whose rows are gathered."""
        rate = self.gpu.tflops * GEMM_SHARE
        if gathered:  # a tile loads its rows and a block's columns, for the product of the two
            rate *= GATHER_SHARE * 2 * gathered / (gathered + BLOCK)
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
    taken = min(1.0, BLOCK * BLOCK / c.v)  # of the tiles of 128 rows, if targets lie anywhere
    logits = c.passes(FORWARD[c.entropy] + taken * AT_TARGETS)
    return {
        "statistics": product + logits + c.bytes(statistics) + c.launches(1),
        "finish": c.bytes(statistics) + c.launches(1),
        "live rows": c.bytes(16 * c.n) + c.launches(2),
    }


def padded(c: Call) -> float:
    """Rows of tiles of `ours_sparse` per active pair. Pairs per block fall as one over the block's
    rank (Zipf), none above N; a block that has any has a tile more than it fills, by half a tile on
    average."""
    return _padded(c.n, -(-c.v // BLOCK), c.share, rows_of(c))


def rows_of(c: Call) -> int:
    return tile_rows(c.n, False, False)


@functools.lru_cache
def _padded(n: int, blocks: int, share: float, rows: int) -> float:
    pairs, low, high = share * n * blocks, 0.0, float(n * blocks)
    for _ in range(40):  # the first block's pairs, such that the sum is right
        first = (low + high) / 2
        counts = [min(n, first / rank) for rank in range(1, blocks + 1)]
        low, high = (first, high) if sum(counts) < pairs else (low, first)

    def tiles(x: float) -> float:
        return -math.expm1(-x) * max(1.0, x / rows + 0.5)

    return sum(rows * tiles(x) for x in counts) / max(sum(counts), 1e-9)


def ours_sparse(c: Call) -> Parts:
    """dz, dH and dW of the active pairs: three gathered products, their loads beside them, float32
    sums of dH and dW."""
    pairs = c.share * c.n * c.v / BLOCK
    moved = pairs * (12 * c.d + 6 * BLOCK * padded(c))  # nothing is loaded where a tile has no row
    products = c.products(3 * c.share * padded(c), gathered=rows_of(c))
    sums = c.bytes(10 * (c.v + c.n) * c.d)
    return {
        "active pairs": products + c.bytes(moved),
        "sums of dH and dW": sums,
        "lists": c.launches(20),
    }


def ours_dense(c: Call) -> Parts:
    """Every column, tile by tile: recompute, dz, dH, dW. A product adds to the float32 sums of its
    rows and columns; where all rows come at once, those of columns are written and not added to."""
    rows, cols = dense_tile(c)
    down, across = math.ceil(c.n / rows), math.ceil(c.v / cols)
    added = c.n * across + (c.v * down if down > 1 else 0)
    return {
        "products": c.products(1) + max(c.products(2), c.bytes(4 * c.n * c.v)),  # they load dz
        "dz": c.passes(DENSE) + c.bytes(2 * c.n * c.v),
        "float32 sums": c.bytes(8 * c.d * added + 10 * (c.n + c.v) * c.d),
        "launches": c.launches(4 * down * across),
    }


def dense_tile(c: Call) -> tuple[int, int]:
    """The tile of the dense backward in bf16 with every row live: lm_head/backward.py."""
    outer = 0 if c.v <= c.n else 1
    given = {"memory_mib": c.memory_mib, "tile_bytes": 2}
    edges = (4, 0) if outer == 0 else (0, 4)
    most = dict(zip(("most_rows", "most_cols"), BACKWARD_TILE["cuda"], strict=True))
    plan = plan_tiles("linear_logprob", c.n, c.v, c.d, edge_bytes=edges, **most, **given)
    if outer == 1:
        plan = all_rows_at_once(plan, c.n, c.v, c.d, edges=edges, **given)
    return plan.rows, plan.cols


def staged(products: float, passes: float, moved: float, sums: float) -> Callable[[Call], Parts]:
    """A peer that keeps chunks of logits in memory: products, passes over them, bytes of each logit
    that move beside the products' own loads, and float32 or 16-bit sums of dW, as bytes of [V, D]
    per 1,024 rows."""

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
    "TRL's fused head": staged(4, 2, 12, 0.5),
    "Liger's fused linear cross entropy": staged(3, 1, 6, 0.5),
    "QuACK's linear cross entropy": staged(3, 1, 4, 0.0),
    "CCE (filtered cross entropy)": lambda c: {
        "products": c.products(2) + c.products(2 * c.share * padded(c)),
        "passes": c.passes(PASS + FORWARD[False]),
        "sums": c.bytes(10 * (c.v + c.n) * c.d),
    },
}


USUAL = (16384, 151936)  # N, V


def total(parts: Parts) -> float:
    return sum(parts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    n, v = USUAL
    parser.add_argument("--gpu", choices=GPUS, default="H200", help="whose rates count")
    for name, default, meaning in (
        ("n", n, "tokens"),
        ("d", 1536, "width of a hidden state"),
        ("v", v, "words"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=meaning)
    parser.add_argument("--share", type=float, default=0.01, help="of active pairs")
    parser.add_argument("--no-entropy", action="store_true", help="log-probs alone")
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
    if given.page or given.picture:
        from benchmarks import model_page

        if given.page:
            given.page.write_text(model_page.page(), encoding="utf-8")
        if given.picture:
            model_page.draw(given.picture)


if __name__ == "__main__":
    main()

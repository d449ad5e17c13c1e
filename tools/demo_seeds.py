"""Does the demo learn? `python -m tools.demo_seeds [--algorithm NAME ...]` runs it on three seeds.

Prints mean reward of the first and last 50 steps and held-out avg@8 before and after, and exits 1
unless both rise by 0.10 on every seed. About eight minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from riskpo.cli import main as riskpo
from riskpo.report.logs import read_records

SEEDS, WINDOW, RISE = (0, 1, 2), 50, 0.10


def measure(run_dir: Path) -> tuple[float, float, float, float]:
    """(mean reward early, late, held-out avg@8 before, after) of a finished run."""
    rewards = [r["reward_mean"] for r in read_records(run_dir, "step")]
    held = [r["avg@8"] for r in read_records(run_dir, "eval")]
    return (
        sum(rewards[:WINDOW]) / WINDOW,
        sum(rewards[-WINDOW:]) / WINDOW,
        held[0],
        held[-1],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    _, more = parser.parse_known_args()
    learned = True
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            run_dir = Path(folder) / str(seed)
            if riskpo(["train", "--seed", str(seed), "--run-dir", str(run_dir), *more]):
                return 1
            first, last, before, after = measure(run_dir)
            learned &= last - first >= RISE and after - before >= RISE
            print(f"seed {seed}: reward {first:.3f} -> {last:.3f}", end=", ")
            print(f"avg@8 {before:.3f} -> {after:.3f}")
    print("learned on every seed" if learned else "did NOT learn on every seed")
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())

"""Random problems under the rule of tolerance: a right backend passes, a planted error does not.

    python -m tools.tolerance_study --problems 200 --threads 1 2

For every named result of the head and the loss (riskpo/doctor/problem.py) the table shows the
largest error of a right backend and the smallest of a spoilt one, both as shares of their limit:
right is at most 1, spoilt is above 1. Spoilt is the right result times 1.001. "loss (cancels)" is
the loss of advantages that make it 1e-6 of its terms; there 1e-3 of the terms is planted.
Gradients in 16 bits are not spoilt: 1e-3 is less than their own rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace

import torch

from riskpo.doctor.machine import DTYPES
from riskpo.doctor.problem import Problem, Yardstick, make_problem, ours, plain, sums, with_bias
from riskpo.doctor.tolerance import Bound

PLANTED = 1e-3
CANCELS = "loss (cancels)"
Shares = dict[tuple[str, str], tuple[float, float]]  # (dtype, name) -> (right, spoilt)


def share(metrics: Iterable[Bound]) -> float:
    """The worst error as a share of its limit; infinite where the limit is 0 and the error not."""
    return max(
        0.0 if m.error == 0 else m.error / m.limit if m.limit else float("inf") for m in metrics
    )


def cancelling(problem: Problem) -> Problem:
    """Its positive advantages scaled so that the loss is about 1e-6 of its terms."""
    new = ours(problem.to(torch.float64), backend="reference").values["logprob"]
    terms = sums(new, problem)["loss"]
    falls, rises = -terms.clamp(max=0).sum(), terms.clamp(min=0).sum()
    scale = ((1 + 1e-6) * rises / falls).float()
    advantage = problem.advantage
    return replace(problem, advantage=torch.where(advantage > 0, advantage * scale, advantage))


def shares(problem: Problem, dtype: str, backend: str) -> dict[str, tuple[float, float]]:
    """(right, spoilt) by name of result."""
    cast = problem.to(DTYPES[dtype])
    yard = Yardstick.of(problem, plain(cast, logits32=True))
    got = ours(cast, backend=backend).values
    found = {}
    for name, value in got.items():
        spoilt = share(yard.bounds(name, value * (1 + PLANTED)))
        if not value.any() or (name.startswith("d") and dtype != "fp32"):
            spoilt = float("inf")  # nothing to spoil
        found[name] = share(yard.bounds(name, value)), spoilt
    return found


def cancelled(problem: Problem, dtype: str, backend: str) -> tuple[float, float]:
    """The same of the loss of a problem where it nearly cancels."""
    problem = cancelling(problem)
    cast = problem.to(DTYPES[dtype])
    yard = Yardstick.of(problem, plain(cast, logits32=True))
    loss = ours(cast, backend=backend).values["loss"]
    off = PLANTED * yard.size["loss"].to(loss)
    return share(yard.bounds("loss", loss)), share(yard.bounds("loss", loss + off))


def study(problems: Iterable[int], threads: int, backend: str = "torch") -> Shares:
    """Largest share of right results and smallest of spoilt ones over these seeds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    worst: Shares = {}
    try:
        for seed in problems:
            problem = with_bias(make_problem(seed=seed), seed)
            for dtype in DTYPES:
                found = shares(problem, dtype, backend)
                found[CANCELS] = cancelled(problem, dtype, backend)
                for name, (right, spoilt) in found.items():
                    old = worst.get((dtype, name), (0.0, float("inf")))
                    worst[dtype, name] = max(right, old[0]), min(spoilt, old[1])
    finally:
        torch.set_num_threads(before)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--backend", default="torch")
    options = parser.parse_args()
    print("| threads | dtype | result | right, largest | spoilt, smallest |")
    print("|---|---|---|---|---|")
    for threads in options.threads:
        for key, found in study(range(options.problems), threads, options.backend).items():
            print(f"| {threads} |", " | ".join((*key, *(f"{x:.2f}" for x in found))), "|")


if __name__ == "__main__":
    main()

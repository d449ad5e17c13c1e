"""Random problems under the rule of tolerance: a right backend passes, a planted error does not.

    python -m tools.tolerance_study --problems 200 --threads 1 2

For every named result of the head and the loss (riskpo/doctor/problem.py) the table shows the
largest error of a right backend and the smallest of a spoilt one, both as shares of their limit:
right is at most 1, spoilt is above 1. Every other problem is the doctor's batch; the others have 1
to 3 rows, or rows that are near-certain, where one plain run's luck is nothing to go by. Spoilt is
the right result times 1.001. "loss (cancels)" is the loss of advantages that make it 1e-6 of its
terms; there 1e-3 of the terms is planted. "head" is linear_logprob alone, with gradients of
logprob, entropy and lse, a bias, and temperature or softcap, of 1 to 40 rows from flat to one-hot.
Not spoilt are gradients in 16 bits, where 1e-3 is less than their own rounding, and results of at
most 1e-3, of which it is less than float32's of a logit.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from riskpo.doctor.machine import DTYPES
from riskpo.doctor.problem import Problem, Yardstick, make_problem, ours, plain, sums
from riskpo.doctor.term_sizes import head_sizes
from riskpo.doctor.tolerance import Bound, bounds
from riskpo_kernels import TokenLogProbs, linear_logprob

PLANTED = 1e-3
CANCELS = "loss (cancels)"
SHAPES: tuple[dict[str, float], ...] = (
    {},
    {"batch": 1, "tokens": 1},
    {},
    {"batch": 1, "tokens": 3, "vocab": 97},
    {},
    {"batch": 3, "tokens": 1, "width": 16, "lean": 16.0},
    {},
    {"lean": 40.0},
)
Shares = dict[tuple[str, str], tuple[float, float]]  # (dtype, name) -> (right, spoilt)


def share(metrics: Iterable[Bound]) -> float:
    """The worst error as a share of its limit; infinite for NaN."""
    shares = [0.0 if m.error == 0 else m.error / (m.limit or 1e-300) for m in metrics]
    return max(float("inf") if math.isnan(x) else x for x in shares)


def draw(seed: int) -> Problem:
    """The problem of a seed, with a bias: its shape goes with the seed."""
    shape = SHAPES[seed % len(SHAPES)]
    lean = shape.get("lean", 8.0)
    sizes = {name: int(size) for name, size in shape.items() if name != "lean"}
    return make_problem(seed=seed, lean=lean, bias=True, **sizes)


def cancelling(problem: Problem) -> Problem | None:
    """Its positive advantages scaled so that the loss is about 1e-6 of its terms; None where these
    have one sign."""
    new = ours(problem.to(torch.float64), backend="reference")["logprob"]
    terms = sums(new, problem)["loss"]
    falls, rises = -terms.clamp(max=0).sum(), terms.clamp(min=0).sum()
    if not falls or not rises:
        return None
    scale = ((1 + 1e-6) * rises / falls).float()
    advantage = problem.advantage
    return replace(problem, advantage=torch.where(advantage > 0, advantage * scale, advantage))


def shares(problem: Problem, dtype: str, backend: str) -> dict[str, tuple[float, float]]:
    """(right, spoilt) by name of result."""
    cast = problem.to(DTYPES[dtype])
    yard = Yardstick.of(problem, plain(cast, logits32=True))
    got = ours(cast, backend=backend)
    found = {}
    for name, value in got.items():
        spoilt = share(yard.bounds(name, value * (1 + PLANTED)))
        if unspoilt(name, value, dtype):
            spoilt = float("inf")
        found[name] = share(yard.bounds(name, value)), spoilt
    return found


def cancelled(problem: Problem, dtype: str, backend: str) -> tuple[float, float]:
    """(right, spoilt) of the loss of a problem whose loss nearly cancels."""
    cast = problem.to(DTYPES[dtype])
    yard = Yardstick.of(problem, plain(cast, logits32=True))
    loss = ours(cast, backend=backend)["loss"]
    off = PLANTED * yard.size["loss"].to(loss)
    return share(yard.bounds("loss", loss)), share(yard.bounds("loss", loss + off))


def values(
    op: Callable[..., TokenLogProbs], leaves: dict[str, torch.Tensor], up: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Results of op(hidden, weight, bias) and gradients of their sum with weights `up`."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    out = op(*leaves.values())
    found = {name: getattr(out, name) for name in up}
    total = torch.stack([(found[name].double() * c).sum() for name, c in up.items()]).sum()
    gradients = torch.autograd.grad(total, tuple(leaves.values()))
    return {name: x.detach() for name, x in found.items()} | {
        "d" + name: x for name, x in zip(leaves, gradients, strict=True)
    }


def head(seed: int, dtype: str, backend: str) -> dict[str, tuple[float, float]]:
    """(right, spoilt) of a random head's results."""
    g = torch.Generator().manual_seed(seed)
    n, wide, vocab = (
        int(torch.randint(low, high, (1,), generator=g))
        for low, high in (((1, 4), (4, 40))[seed % 2], (3, 96), ((2, 9), (10, 900))[seed // 2 % 2])
    )
    weight, target = torch.randn(vocab, wide, generator=g), torch.randint(vocab, (n,), generator=g)
    pull = torch.rand(n, 1, generator=g) * (1.0, 6.0, 20.0)[seed % 3] / wide**0.5
    hidden = 0.5 * torch.randn(n, wide, generator=g) + pull * weight[target]
    given = {"hidden": hidden, "weight": weight, "bias": torch.randn(vocab, generator=g)}
    given = {name: x.to(DTYPES[dtype]) for name, x in given.items()}
    exact = {name: x.double() for name, x in given.items()}
    up = {
        k: torch.randn(n, generator=g, dtype=torch.float64) for k in ("logprob", "entropy", "lse")
    }
    options: dict[str, float] = ({}, {"temperature": 0.6}, {"softcap": 20.0})[seed % 5 % 3]

    def ours(backend: str) -> Callable[..., TokenLogProbs]:
        return lambda h, w, b: linear_logprob(
            h, w, target, bias=b, return_entropy=True, backend=backend, **options
        )

    def honest(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> TokenLogProbs:
        z = (h.float() @ w.float().T + b.float()) / options.get("temperature", 1.0)
        cap = options.get("softcap")
        z = cap * torch.tanh(z / cap) if cap else z
        logp = torch.log_softmax(z, -1)
        picked = logp.gather(-1, target[:, None])[:, 0]
        return TokenLogProbs(picked, -(logp.exp() * logp).sum(-1), z.logsumexp(-1))

    truth, plainly = values(ours("reference"), exact, up), values(honest, given, up)
    sizes = head_sizes(**given, target=target, upstream=up, **options)  # type: ignore[arg-type]
    found = {}
    for name, got in values(ours(backend), given, up).items():
        right, off = (
            share(bounds(x, truth[name], plainly[name], size=sizes[name]))
            for x in (got, got * (1 + PLANTED))
        )
        found["head: " + name] = right, float("inf") if unspoilt(name, got, dtype) else off
    return found


def unspoilt(name: str, value: torch.Tensor, dtype: str) -> bool:
    """Whether 1e-3 of it is less than what its dtype or float32's logits hold."""
    return bool(value.abs().max() <= 1e-3) or (name.startswith("d") and dtype != "fp32")


def study(problems: Iterable[int], threads: int, backend: str = "torch") -> Shares:
    """Largest share of right results and smallest of spoilt ones over these seeds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    worst: Shares = {}
    try:
        for seed in problems:
            problem = draw(seed)
            opposed = cancelling(problem)
            for dtype in DTYPES:
                found = shares(problem, dtype, backend) | head(seed, dtype, backend)
                if opposed is not None:
                    found[CANCELS] = cancelled(opposed, dtype, backend)
                for name, (right, spoilt) in found.items():
                    old = worst.get((dtype, name), (0.0, float("inf")))
                    worst[dtype, name] = max(right, old[0]), min(spoilt, old[1])
    finally:
        torch.set_num_threads(before)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=200, help="how many")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="each in turn")
    parser.add_argument("--backend", default="torch", help="torch or triton")
    options = parser.parse_args()
    print(f"{options.problems} problems; the worst of {', '.join(DTYPES)}\n")
    print("| threads | result | right, largest | spoilt, smallest |\n|---|---|---|---|")
    for threads in options.threads:
        found = study(range(options.problems), threads, options.backend)
        for name in dict.fromkeys(name for _, name in found):
            both = [found[key] for key in found if key[1] == name]
            right, spoilt = max(x for x, _ in both), min(x for _, x in both)
            print(f"| {threads} | {name} | {right:.2f} | {spoilt:.1f} |")


if __name__ == "__main__":
    main()

"""Conditional credit by brute force: every way to choose the other responses of a draw."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from riskpo_kernels.reference.risk import mean

Rows = dict[str, list[int]]  # question -> its rows
Bundling = tuple[list[list[str]], Rows]  # questions of each bundle, and their rows in it
Advantages = Callable[[list[float]], list[float]]


def conditional(
    r: list[float], bundlings: list[Bundling], advantages: Advantages, o: dict[str, Any]
) -> tuple[dict[int, float], dict[str, float]]:
    """Each bundled row's advantage: A averaged over each way to choose the others of its draw."""
    used = sorted({i for bundles, rows in bundlings for b in bundles for n in b for i in rows[n]})
    low, high = min(r[i] for i in used), max(r[i] for i in used)
    step = high - low or 1.0
    advantage: dict[int, float] = {}
    credit: list[float] = []
    noise: list[float] = []
    by_class: dict[str, list[float]] = {}
    for bundles, rows in bundlings:
        for bundle, name in ((b, n) for b in bundles for n in b):
            others = [[r[i] for i in rows[other]] for other in bundle if other != name]
            sums = [sum(choice) for choice in itertools.product(*others)]

            def mean_a(x: float, sums: list[float] = sums) -> tuple[float, float]:
                a = advantages([x + s for s in sums])
                return mean(a), mean([(y - mean(a)) ** 2 for y in a])

            own = [mean_a(r[i])[0] for i in rows[name]]
            credit += own
            noise += [mean_a(r[i])[1] for i in rows[name]]
            place = (mean([r[i] for i in rows[name]]) - low) / step
            kind = "hard" if place < 0.2 - 1e-9 else "easy" if place > 0.8 + 1e-9 else "middle"
            weight = (mean_a(low + step)[0] - mean_a(low)[0]) / step
            by_class.setdefault(f"weight_{kind}", []).extend([weight] * len(own))
            if o["baseline"] == "leave-one-out":
                own = [x - mean(own[:i] + own[i + 1 :]) for i, x in enumerate(own)]
            advantage |= dict(zip(rows[name], own, strict=True))
    if o["baseline"] == "batch":
        advantage = {i: x - mean(list(advantage.values())) for i, x in advantage.items()}
    spread = mean([(c - mean(credit)) ** 2 for c in credit])
    total = mean(noise) + spread
    stats = {name: mean(weights) for name, weights in by_class.items()}
    stats |= {"variance_removed": mean(noise) / total if total else 0.0, "credit_error": 0.0}
    return advantage, stats

"""mvar_advantage and mvar on bundle scores [K, G]: a step's worth is a few thousand numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from riskpo_kernels import mvar, mvar_advantage, reference

# The two published runs: 512 questions x 10 and 1024 x 5 in bundles of 5, and a large batch.
CASES: dict[str, dict[str, int]] = {
    "512x10": {"bundles": 102, "draws": 10},
    "1024x5": {"bundles": 204, "draws": 5},
    "8192x16": {"bundles": 1638, "draws": 16},
}


def inputs(bundles: int, draws: int, device: str = "cpu") -> dict[str, Any]:
    """Scores 0..5 [K, G] float32 and one pair of quantiles."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (bundles, draws), generator=generator).float()
    return {"scores": scores.to(device), "q_alpha": 1.0, "q_beta": 4.0}


def providers() -> dict[str, Callable[..., Any]]:
    """Each takes inputs() as keywords."""
    return {"riskpo_kernels": _step(mvar_advantage, mvar), "reference": _step(*_REFERENCE)}


def cost(bundles: int, draws: int) -> dict[str, float]:
    """Least bytes moved (scores in, advantages out, one sort's read) and arithmetic operations."""
    n = bundles * draws
    return {"bytes": 4.0 * 3 * n, "flops": 10.0 * n}


_REFERENCE = (reference.mvar_advantage, reference.mvar)


def _step(advantage: Callable[..., Any], measure: Callable[..., Any]) -> Callable[..., Any]:
    def run(scores: torch.Tensor, q_alpha: float, q_beta: float) -> Any:
        return advantage(scores, q_alpha, q_beta), measure(scores.flatten(), 0.2, 0.8, 0.5)

    return run

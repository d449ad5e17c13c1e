"""RiskPOAdvantage from flat rewards to flat advantages: what one training step pays on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from riskpo_kernels import RiskPOAdvantage, reference

# The two published runs (their 2 and 4 surplus questions left out), and a large batch.
CASES: dict[str, dict[str, int]] = {
    "512x10": {"questions": 510, "draws": 10},
    "1024x5": {"questions": 1020, "draws": 5},
    "8192x16": {"questions": 8190, "draws": 16},
}


def inputs(questions: int, draws: int, device: str = "cpu") -> dict[str, Any]:
    """Rewards [N] of 0 and 1 and question ids [N], interleaved as samplers return them."""
    generator = torch.Generator().manual_seed(0)
    rewards = (torch.rand(questions * draws, generator=generator) < 0.4).float()
    ids = torch.arange(questions).repeat(draws)
    return {"rewards": rewards.to(device), "question_id": ids.to(device)}


def providers() -> dict[str, Callable[..., Any]]:
    """Each takes inputs() as keywords; the state after the first call is part of a step."""
    return {
        "riskpo_kernels": _steps(RiskPOAdvantage("paper")),
        "reference": _steps(reference.RiskPOAdvantage("paper")),
    }


def cost(questions: int, draws: int) -> dict[str, float]:
    """Least bytes moved (reward, id and advantage per response) and arithmetic operations."""
    n = questions * draws
    return {"bytes": (4.0 + 8.0 + 4.0) * n, "flops": 12.0 * n}


def _steps(make: Callable[..., Any]) -> Callable[..., Any]:
    steps = iter(range(2**31))

    def run(rewards: torch.Tensor, question_id: torch.Tensor) -> Any:
        return make(rewards, question_id, step=next(steps))

    return run

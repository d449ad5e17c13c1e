"""Rewards in {0, 1} from verl's own scorers, some of which (math_dapo) answer in {-1, 1}.

reward.custom_reward_function.path=pkg://riskpo.integrations.verl.reward
reward.custom_reward_function.name=zero_one
"""

from __future__ import annotations

from typing import Any

from verl.utils.reward_score import default_compute_score


def zero_one(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **others: Any
) -> dict[str, float]:
    """{"score": 1.0 where verl's scorer for `data_source` gives more than 0, else 0.0}.

    With scores in {-1, 1} bundles would span twice the range and the tracked quantiles would move
    at half their speed. Errors are verl's.
    """
    result = default_compute_score(data_source, solution_str, ground_truth, extra_info, **others)
    score = result["score"] if isinstance(result, dict) else result
    return {"score": float(float(score) > 0), "verl_score": float(score)}

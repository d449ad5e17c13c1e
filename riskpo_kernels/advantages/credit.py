"""How a draw's advantage is handed to the responses in it.

K bundles, B questions in each, G draws = responses per question:

    a  [K, G]      advantage of the draws            r  [K, B, G]   reward of question i in draw j
    returns [K, B, G], float64

"uniform" is the paper's (arXiv 2510.00911: every response carries its draw's advantage); the other
three are modes of the official code (RTkenny/RiskPO) and have no published description.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

SMALLEST_STD = 1e-3  # official code: below it a question counts as all alike and is not divided
SMALLEST_TOTAL = 1e-6  # official code: below it the draw's advantage is split evenly

Credit = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def uniform(a: torch.Tensor, r: torch.Tensor, eps: float) -> torch.Tensor:
    """a for each of the B responses."""
    return a[:, None, :].expand_as(r)


def score(a: torch.Tensor, r: torch.Tensor, eps: float) -> torch.Tensor:
    """Half of a where the response was rewarded, one and a half where it was not."""
    return a[:, None, :] * torch.where(r > 0, 0.5, 1.5)


def std(a: torch.Tensor, r: torch.Tensor, eps: float) -> torch.Tensor:
    """a / (sigma_i + eps), sigma_i the std of question i's rewards (n - 1), 1 if they are alike."""
    if r.shape[-1] == 1:
        return a[:, None, :] / (torch.ones_like(r) + eps)
    sigma = r.std(-1, keepdim=True)
    sigma = torch.where(sigma > SMALLEST_STD, sigma, torch.ones_like(sigma))
    return a[:, None, :] / (sigma + eps)


def sum_mean(a: torch.Tensor, r: torch.Tensor, eps: float) -> torch.Tensor:
    """a * ratio_i / sum_i ratio_i with ratio_i = r_i minus question i's mean; shares sum to a.

    a / B each where the ratios sum to nothing. Gives right answers a negative share wherever a and
    R - mean(R) have opposite signs: kept because the official hard run uses it.
    """
    ratio = r - r.mean(-1, keepdim=True)
    total = ratio.sum(1, keepdim=True)
    split = total.abs() > SMALLEST_TOTAL
    share = ratio / torch.where(split, total, torch.ones_like(total))
    return a[:, None, :] * torch.where(split, share, torch.full_like(share, 1 / r.shape[1]))


CREDITS: dict[str, Credit] = {
    "uniform": uniform,
    "score": score,
    "std": std,
    "sum-mean": sum_mean,
}

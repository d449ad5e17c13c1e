"""Numbers that every step logs, whatever the algorithm, so that runs can be compared.

Lower tails, MVaR and covariances use the paper's bundle size, levels and omega; those of the run's
algorithm show in its q_alpha and q_beta. Q questions, G responses each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from riskpo.metrics.covariance import ALPHA, BETA, BUNDLE, OMEGA, covariance_terms
from riskpo.rollout.collect import Batch
from riskpo.types import Question
from riskpo_kernels import bundle_scores, mvar, rvar


def risk_curves(rewards_QG: torch.Tensor) -> dict[str, float]:
    """Lower-tail RVaR, MVaR and the two quantiles of bundle scores, in score units (0 to BUNDLE).

    Bundles are consecutive questions; what does not fill a bundle is left out. The quantiles are
    interpolated linearly, as the first value of a tracker is.
    """
    full = len(rewards_QG) // BUNDLE * BUNDLE
    if not full:
        return {}
    scores = bundle_scores(rewards_QG[:full], BUNDLE).flatten()
    return {
        "rvar_lower": float(rvar(scores, 0.0, ALPHA)),
        "mvar": float(mvar(scores, ALPHA, BETA, OMEGA)),
        "batch_q_alpha": float(torch.quantile(scores, ALPHA)),
        "batch_q_beta": float(torch.quantile(scores, BETA)),
    }


def all_equal(rewards_QG: torch.Tensor) -> dict[str, float]:
    """Shares of the questions whose responses are all wrong (reward 0 or less), or all right."""
    right = rewards_QG > 0
    return {
        "all_wrong_fraction": float((~right).all(1).float().mean()),
        "all_right_fraction": float(right.all(1).float().mean()),
    }


def sampled_entropy(logprobs: Sequence[torch.Tensor]) -> float:
    """Minus the mean log-prob of all sampled tokens that have one, in nats.

    An unbiased estimate of the token entropy. The update's "entropy" is exact, but covers only the
    responses that are learned from: with DAPO, the questions of middle difficulty.
    """
    logprob = torch.cat(list(logprobs))
    given = logprob[~logprob.isnan()]
    return -float(given.mean()) if len(given) else 0.0


def by_stratum(questions: Sequence[Question], rewards_QG: torch.Tensor) -> dict[str, float]:
    """Mean reward of each meta["stratum"] as "reward_STRATUM"; {} where questions have none."""
    rows: dict[str, list[int]] = {}
    for row, question in enumerate(questions):
        if "stratum" in question.meta:
            rows.setdefault(question.meta["stratum"], []).append(row)
    return {f"reward_{name}": float(rewards_QG[rows[name]].mean()) for name in sorted(rows)}


def covariances(batch: Batch) -> dict[str, float]:
    """`covariance_terms` of the responses that are learned from, as their sampler saw them."""
    each = [float(x.sum()) for x in batch.rollouts.logprob]
    if any(x != x for x in each):  # without a log-prob of every token there is no covariance
        return {}
    sequence_logprob = torch.tensor(each, dtype=torch.float64).view_as(batch.rewards_QG)
    return covariance_terms(sequence_logprob, batch.rewards_QG)

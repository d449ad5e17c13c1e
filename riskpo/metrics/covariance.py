"""Does log-probability go with reward? The two terms behind the entropy claim of RiskPO.

Cov(log pi, A) at fixed question is minus the rate at which an advantage A changes the entropy, for
a tabular softmax policy under a natural-gradient step (arXiv 2510.00911, Proposition 1). For scores
R, quantiles q_a <= q_b and tail weight omega the paper's advantage A_MVaR and the mean's A_mean = R
differ by an identity, exact for any numbers:

    Cov(l, A_mean) - Cov(l, A_MVaR) = Cov(l, (R - q_b)^+) + omega Cov(l, (q_a - R)^+)
                                       "upper"              "lower"

The paper's Theorem 2 says that the left side is not negative; which of the two terms makes it so,
or does not, is what a run should show. Q questions, G responses each, B questions per bundle.
"""

from __future__ import annotations

import torch

from riskpo.group_advantages import minus_mean
from riskpo_kernels import bundle_scores, mvar_advantage

BUNDLE, ALPHA, BETA, OMEGA = 5, 0.2, 0.8, 0.5  # arXiv 2510.00911
TIED = 1e-12  # a spread below this is none: its correlation counts as 0


def covariance_terms(
    sequence_logprob_QG: torch.Tensor, rewards_QG: torch.Tensor
) -> dict[str, float]:
    """Means over questions of Cov(l, A) within a question, in nats times score units.

    l is the log-prob [Q, G] of the whole response under the policy that sampled it. R is the score
    of the response's bundle: the j-th response to BUNDLE consecutive questions. The others in it
    are independent of the response, so they add noise and no bias. Quantiles are the batch's own
    (linear interpolation). Questions that fill no bundle are left out. {} if nothing is left, or
    with one response per question.

      cov_mean, cov_mvar     Cov(l, R), Cov(l, A_MVaR), A_MVaR in the paper's form, unscaled
      cov_upper, cov_lower   Cov(l, (R - q_b)^+), Cov(l, (q_a - R)^+)
      corr_mean, corr_mvar   the first two as correlations, 0 where either side is constant
    """
    full = len(rewards_QG) // BUNDLE * BUNDLE
    if not full or rewards_QG.shape[1] < 2:
        return {}
    logprob = sequence_logprob_QG[:full].double()
    scores_KG = bundle_scores(rewards_QG[:full].double(), BUNDLE)
    levels = torch.tensor([ALPHA, BETA], dtype=torch.float64)
    q_alpha, q_beta = torch.quantile(scores_KG.flatten(), levels).tolist()
    score = scores_KG.repeat_interleave(BUNDLE, 0)  # [Q, G]
    averse = mvar_advantage(score, q_alpha, q_beta, alpha=ALPHA, beta=BETA, omega=OMEGA)
    return {
        "cov_mean": _covariance(logprob, score),
        "cov_mvar": _covariance(logprob, averse),
        "cov_upper": _covariance(logprob, (score - q_beta).clamp(min=0)),
        "cov_lower": _covariance(logprob, (q_alpha - score).clamp(min=0)),
        "corr_mean": _correlation(logprob, score),
        "corr_mvar": _correlation(logprob, averse),
    }


def _covariance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean over rows of the row's covariance (n - 1); [Q, G] each."""
    return float((minus_mean(x) * minus_mean(y)).sum(1).mean() / (x.shape[1] - 1))


def _correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = minus_mean(x), minus_mean(y)
    spread = x.square().sum(1).sqrt() * y.square().sum(1).sqrt()
    each = (x * y).sum(1) / spread.clamp(min=TIED)
    return float(torch.where(spread > TIED, each, 0.0).mean())

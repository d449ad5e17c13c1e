"""The mathematics of the library in plain PyTorch: same names, same signatures, any dtype.

Written to be read against the papers; materialises whatever it likes. Every test and every
benchmark of riskpo_kernels compares with it.
"""

from riskpo_kernels.reference.advantage import RiskPOAdvantage
from riskpo_kernels.reference.divergence import linear_divergence, topk_divergence
from riskpo_kernels.reference.fused import riskpo_loss, riskpo_loss_from_logits
from riskpo_kernels.reference.logprob import TokenLogProbs, linear_logprob, logits_logprob
from riskpo_kernels.reference.risk import (
    MonitorRisk,
    QuantileTracker,
    bundle_scores,
    cvar,
    mvar,
    mvar_advantage,
    official_monitor,
    pass_at_k,
    rvar,
)
from riskpo_kernels.reference.surrogate import SurrogateLoss, clipped_surrogate, sequence_logprob

__all__ = [
    "MonitorRisk",
    "QuantileTracker",
    "RiskPOAdvantage",
    "SurrogateLoss",
    "TokenLogProbs",
    "bundle_scores",
    "clipped_surrogate",
    "cvar",
    "linear_divergence",
    "linear_logprob",
    "logits_logprob",
    "mvar",
    "mvar_advantage",
    "official_monitor",
    "pass_at_k",
    "riskpo_loss",
    "riskpo_loss_from_logits",
    "rvar",
    "sequence_logprob",
    "topk_divergence",
]

"""Exact, memory-flat log-probs and risk-averse losses for RL post-training of language models."""

from riskpo_kernels.advantage import RiskPOAdvantage
from riskpo_kernels.causal_lm import add_fused_lm_head
from riskpo_kernels.core.backends import backend_report
from riskpo_kernels.fused import riskpo_loss, riskpo_loss_from_logits
from riskpo_kernels.linear_divergence import linear_divergence, topk_divergence
from riskpo_kernels.linear_logprob import linear_logprob
from riskpo_kernels.logits_logprob import logits_logprob
from riskpo_kernels.reference import SurrogateLoss, TokenLogProbs
from riskpo_kernels.risk import (
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
from riskpo_kernels.sharding import full_weight, gathered_weight
from riskpo_kernels.surrogate import clipped_surrogate, sequence_logprob

__version__ = "0.1.0"
__all__ = [
    "MonitorRisk",
    "QuantileTracker",
    "RiskPOAdvantage",
    "SurrogateLoss",
    "TokenLogProbs",
    "add_fused_lm_head",
    "backend_report",
    "bundle_scores",
    "clipped_surrogate",
    "cvar",
    "full_weight",
    "gathered_weight",
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

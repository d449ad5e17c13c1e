"""Exact, memory-flat log-probs and risk-averse losses for RL post-training of language models."""

from riskpo_kernels.backends import backend_report
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

__version__ = "0.1.0"
__all__ = [
    "MonitorRisk",
    "QuantileTracker",
    "backend_report",
    "bundle_scores",
    "cvar",
    "mvar",
    "mvar_advantage",
    "official_monitor",
    "pass_at_k",
    "rvar",
]

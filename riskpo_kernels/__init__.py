"""Exact, memory-flat log-probs and risk-averse losses for RL post-training of language models."""

from riskpo_kernels.backends import backend_report

__version__ = "0.1.0"
__all__ = ["backend_report"]

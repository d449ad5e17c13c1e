"""Moved to riskpo_kernels.causal_lm."""

from riskpo_kernels.causal_lm import Head, HeadOptions, find_head

__all__ = ["Head", "HeadOptions", "find_head"]

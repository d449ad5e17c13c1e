"""Moved to riskpo_kernels.causal_lm."""

from riskpo_kernels.causal_lm import decoder_of, unwrapped

__all__ = ["decoder_of", "unwrapped"]

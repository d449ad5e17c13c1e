"""The mathematics of the library in plain PyTorch: same names, same signatures, any dtype.

Written to be read against the papers; materialises whatever it likes. Every test and every
benchmark of riskpo_kernels compares with it.
"""

from riskpo_kernels.reference.logprob import TokenLogProbs, linear_logprob, logits_logprob

__all__ = ["TokenLogProbs", "linear_logprob", "logits_logprob"]

"""Causal language models of transformers: their decoder, their head, log-probs in their forward.

`add_fused_lm_head(model)` is the way in. What it is made of is public too: `find_head` gives a
model's head as numbers, `decoder_of` the module that makes the hidden states, `unwrapped` the model
inside torch.compile's and peft's wrappers, `relative_gap` how far a head is from given logits.
"""

from riskpo_kernels.causal_lm.decoder import decoder_of, unwrapped
from riskpo_kernels.causal_lm.fused import FusedLMHead, add_fused_lm_head
from riskpo_kernels.causal_lm.head import Head, HeadOptions, find_head
from riskpo_kernels.causal_lm.head_probe import relative_gap

__all__ = [
    "FusedLMHead",
    "Head",
    "HeadOptions",
    "add_fused_lm_head",
    "decoder_of",
    "find_head",
    "relative_gap",
    "unwrapped",
]

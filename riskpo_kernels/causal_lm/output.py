"""What a model with a fused head returns. Imports transformers, so only a call does it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class FusedCausalLMOutput(ModelOutput):
    """The fields of TRL's class of this name that are computed here; 0 where the label is -100.

    loss        [], the negative log-likelihood, summed over the labels that are not -100 and
                divided by num_items_in_batch, or by their number
    log_probs   [B, T - 1], or [B, T] for shift_labels; float32, nats
    entropy     like log_probs; None unless add_fused_lm_head was asked for it
    label_mask  like log_probs, bool: the label is not -100
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None

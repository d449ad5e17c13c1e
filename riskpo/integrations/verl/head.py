"""linear_logprob as a backend of verl's fused head, for a verl that lets plugins add one.

verl 0.9.1 names its backends in its own lists. examples/verl/fused_head.patch gives it a dictionary
of them, FUSED_LINEAR_BACKENDS; with it, use_fused_kernels=True and
fused_kernel_options.impl_backend=riskpo take this function. Without the patch nothing happens.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import torch

from riskpo_kernels import linear_logprob

NAME = "riskpo"
MODULE, PLACE = "verl.utils.experimental.torch_functional", "FUSED_LINEAR_BACKENDS"


def fused_linear(
    hidden_states: torch.Tensor,
    vocab_weights: torch.Tensor,
    input_ids: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log_probs, entropy), float32, shaped as input_ids [..., T], which are shifted already."""
    logprob, entropy, _ = linear_logprob(
        hidden_states, vocab_weights, input_ids, temperature=temperature, return_entropy=True
    )
    assert entropy is not None  # it was asked for
    return logprob, entropy


def register_head() -> bool:
    """Enter it among verl's backends; False where verl has no place for it.

    The module is read before it is imported: it imports Liger and flash-attn, in every process.
    """
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None or PLACE not in Path(spec.origin).read_text("utf-8"):
        return False
    getattr(importlib.import_module(MODULE), PLACE)[NAME] = fused_linear
    return True

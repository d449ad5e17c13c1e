"""No dropout in the update: the policy that is trained is the one that has sampled.

Log-probs under dropout are those of another, random policy: ratios move and clip though no weight
has. So the model stays in eval mode, which every kind of it obeys (modules, functions, layer drop,
router jitter, adapters'); only what checkpoints its activations is told that it trains, since
transformers asks for that, and loses its own dropout.
"""

from __future__ import annotations

from typing import Any


def train_without_dropout(model: Any) -> None:
    """Ready for an update, in place: eval mode, with activation checkpointing where it is on."""
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)

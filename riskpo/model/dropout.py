"""No dropout in the update, so that the trained policy is the one that sampled.

Dropout gives the log-probs of another, random policy: ratios leave 1 although no weight has moved.
The model therefore stays in eval mode, which switches off every kind of dropout (modules,
functions, layer drop, router jitter, adapters). transformers checkpoints activations in training
mode only, so checkpointed modules are set to training mode and their dropout rates to 0.
"""

from __future__ import annotations

from typing import Any


def train_without_dropout(model: Any) -> None:
    """Put the model in eval mode, in place; activation checkpointing stays on if it is."""
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):
                    setattr(module, name, 0.0)

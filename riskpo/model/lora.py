"""LoRA through peft: small trainable matrices beside frozen weights.

Adapters sit inside the linear layers, so sampling, packing and the fused head work as without
them. The head is frozen, and the fused loss computes no gradient for it. A checkpoint holds the
adapter and names the base model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from riskpo.config import LoraConfig
from riskpo.distributed import whole_tensor


def attach_lora(model: Any, config: LoraConfig, seed: int) -> None:
    """Freeze `model` and add adapters to the layers named by config.targets, in place.

    The new matrices are a function of `seed`; B is zero, so the model's outputs stay. ValueError
    without peft, or for the head or embedding as a target.
    """
    try:
        import peft
    except ImportError:
        raise ValueError(
            "lora: peft is not installed. Install it with pip install 'riskpo[lora]'."
        ) from None
    targets: Any = list(config.targets)
    if targets == ["all-linear"]:
        targets = "all-linear"  # peft leaves the output embedding out
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                target_modules=targets,
                lora_dropout=0.0,  # the sampler has none, so the trainer must not either
                task_type="CAUSAL_LM",
            )
        )
    refuse_adapted_head(model)


def thaw_lora(model: Any) -> None:
    """Make the adapters of a loaded model trainable, and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    refuse_adapted_head(model)


def refuse_adapted_head(model: Any) -> None:
    """ValueError where the head or the embedding carries an adapter.

    The fused loss multiplies with the head's weight: an adapter there would get no gradient, yet
    the sampler would use it.
    """
    for what, module in (
        ("the head", model.get_output_embeddings()),
        ("the embedding", model.get_input_embeddings()),
    ):
        if hasattr(module, "base_layer"):
            raise ValueError(
                f"lora: got an adapter on {what}; expected adapters on inner layers only, since "
                "the loss is computed from the head's plain weight. Take it out of lora.targets."
            )


def plain_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every parameter with its adapters merged in, under the base model's names.

    Tensors are detached and made one at a time, so that no second copy of the model is held. A
    parameter shared by two modules comes once.
    """
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        if ".base_layer." not in name:
            yield name, whole_tensor(parameter)
            continue
        owner, _, last = name.rpartition(".base_layer.")
        layer = model.get_submodule(owner)
        merged = whole_tensor(parameter)
        if last == "weight":
            for adapter in layer.active_adapters:  # scaling * B A, in the adapter's dtype
                a, b = (whole_tensor(x[adapter].weight) for x in (layer.lora_A, layer.lora_B))
                merged = merged + (layer.scaling[adapter] * (b @ a)).to(merged.dtype)
        yield f"{owner}.{last}", merged

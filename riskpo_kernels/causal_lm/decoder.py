"""The decoder of a causal LM, and the causal LM inside what is wrapped around it."""

from __future__ import annotations

from typing import Any


def unwrapped(model: Any) -> Any:
    """The causal LM inside torch.compile's and peft's wrappers; ValueError for virtual tokens."""
    model = getattr(model, "_orig_mod", model)
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"head: got {model.active_peft_config.peft_type.value} by peft; expected adapters "
            "inside the model's layers, since packed sequences have no room for virtual tokens. "
            "Use LoRA."
        )
    return model.get_base_model()


def decoder_of(model: Any) -> Any:
    """The module that turns token ids into last hidden states: the model without its head.

    transformers' get_decoder() gives the head of some models (RemBERT, ModernBERT's decoder) and
    the whole of others (Llama 4, Mllama).
    """
    model = unwrapped(model)
    decoder = model.get_decoder()
    if not hasattr(decoder, "get_input_embeddings"):
        return model.base_model  # a head that is called decoder
    if decoder.get_output_embeddings() is not None:
        return getattr(decoder, "model", decoder)
    return decoder

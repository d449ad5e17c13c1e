"""The longest sequence a model can read, checked before anything is sampled."""

from __future__ import annotations

from typing import Any

import torch

from riskpo_kernels.causal_lm import decoder_of

POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "positions_embed")


def position_limit(model: Any) -> int | None:
    """Largest number of tokens that `model` has positions for; None if unknown.

    The size of its table of learned positions; else max_position_embeddings times the factor by
    which its rotary positions are scaled.
    """
    tables = [
        # OPT's table begins with `offset` unused rows, RoBERTa's with those up to its padding.
        m.num_embeddings - getattr(m, "offset", 0 if m.padding_idx is None else m.padding_idx + 1)
        for name, m in decoder_of(model).named_modules()
        if isinstance(m, torch.nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES
    ]
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if tables or not limit:
        return min(tables) if tables else None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer = [rope, *(r for r in rope.values() if isinstance(r, dict))]
    stretched = [
        r["factor"] * (r.get("original_max_position_embeddings") or limit)
        for r in by_layer
        if r.get("factor")
    ]
    return int(max([limit, *stretched]))


def check_positions(model: Any, prompt_tokens: int, response_tokens: int) -> None:
    """ValueError if prompt and response together have more tokens than the model has positions."""
    limit = position_limit(model)
    if limit is not None and prompt_tokens + response_tokens > limit:
        raise ValueError(
            f"sample: got a prompt of {prompt_tokens} tokens and max_response_tokens="
            f"{response_tokens}; expected at most {limit} together, the positions of this "
            f"{type(model).__name__}. Lower max_response_tokens, or max_prompt_tokens to leave out "
            "long questions."
        )

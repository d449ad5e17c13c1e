"""Read a prompt once for all its responses, if the model allows it.

transformers' generate reads the prompt of every row: with 8 responses to a question, 8 times.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from riskpo.model.load import Policy

_PLAIN = {DynamicLayer, DynamicSlidingWindowLayer}  # keys and values, and nothing else
_GOES_ON: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # by model


def prompt_cache(policy: Policy, ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache | None:
    """Keys and values of each row's prompt but its last token, computed once for equal prompts.

    ids, mask [rows, W]. None if no prompts are equal, or if the model gives other logits with the
    cache than without. Each model is tried once, on its first prompts.
    """
    both, row = torch.cat([ids, mask], 1).unique(dim=0, return_inverse=True)
    if policy.processor or len(both) == len(row) or ids.shape[1] == 1:
        return None
    prompts, seen = both.chunk(2, dim=1)
    if policy.model not in _GOES_ON:
        cache = _read(policy, prompts[:, :-1], seen[:, :-1])
        _GOES_ON[policy.model] = cache is not None and _same_next_word(policy, prompts, seen, cache)
    cache = _read(policy, prompts[:, :-1], seen[:, :-1]) if _GOES_ON[policy.model] else None
    if cache is not None:
        cache.batch_select_indices(row)
    return cache


def _read(policy: Policy, ids: torch.Tensor, mask: torch.Tensor) -> DynamicCache | None:
    """The model's cache of these tokens; None if it holds more than keys and values."""
    cache = getattr(_one_word(policy, ids, mask), "past_key_values", None)
    if type(cache) is not DynamicCache or not {type(x) for x in cache.layers} <= _PLAIN:
        return None
    return cache


def _same_next_word(
    policy: Policy, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache
) -> bool:
    """Whether the next token's logits are the same with the cache, up to rounding in 16 bits."""
    try:
        ours = _one_word(policy, ids, mask, past_key_values=cache).logits[0].float()
    except (ValueError, TypeError):  # it takes none
        return False
    theirs = _one_word(policy, ids, mask).logits[0].float()
    return bool((ours - theirs).abs().max() < 0.02 * (theirs.amax() - theirs.amin()))


def _one_word(policy: Policy, ids: torch.Tensor, mask: torch.Tensor, **given: Any) -> Any:
    return policy.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        synced_gpus=False,
        **given,
    )

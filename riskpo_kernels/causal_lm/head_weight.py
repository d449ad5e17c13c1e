"""The weight and bias that a head multiplies with, found through peft's wrappers.

modules_to_save and trainable tokens are read at every call, so that the active adapter's weight is
used and gets its gradients; so is LoRA, as the product of low rank that it is. Any other head
(another adapter, a quantised layer, a hook) has logits that neither gives, some only after
training; it is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

# Their hooks and replaced forwards gather, move and cast; they leave the mathematics.
KEEP_VALUES = ("torch.distributed", "accelerate", "deepspeed", "transformers", "trl", "riskpo")
LORA = "peft.tuners.lora.layer.Linear"
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def computed(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias) that the head's forward uses now, with gradients to what they are made of."""
    parts = getattr(module, "_modules", {})
    if "modules_to_save" in parts:
        active = module.modules_to_save[module.active_adapters[0]] if _acts(module) else None
        return computed(module.original_module if active is None else active)
    if "token_adapter" in parts:
        return computed(module.token_adapter if _acts(module) else module.original_module)
    if _has_tokens(module):
        if module.disable_adapters or module.merged or not module.active_adapters:
            return computed(module.base_layer)
        # peft's forward takes no bias here
        return module.get_merged_weights(module.active_adapters), None
    if _is_lora(module):
        return computed(module.base_layer)
    return module.weight, module.bias


def low_rank(module: Any) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """(A [r, D], B [V, r], factor) of the adapters that act now; None where none does."""
    if not _is_lora(module) or module.disable_adapters or module.merged:
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    parts = [(module.lora_A[n].weight, module.lora_B[n].weight, module.scaling[n]) for n in names]
    if len(parts) > 1:
        factored = torch.cat([b * factor for _, b, factor in parts], 1)
        return torch.cat([a for a, _, _ in parts]), factored, 1.0
    return parts[0] if parts else None


def _is_lora(part: Any) -> bool:
    return f"{type(part).__module__}.{type(part).__qualname__}" == LORA


def _more_than_lora(part: Any) -> str | None:
    """What an adapter of LoRA's class does beside its product, in any of its settings."""
    if not _is_lora(part):
        return ""
    kinds = {type(v).__name__ for v in getattr(part, "lora_variant", {}).values()}
    if any(getattr(b, "bias", None) is not None for b in part.lora_B.values()):
        kinds.add("lora_bias")
    if any(getattr(d, "p", 0.0) for d in part.lora_dropout.values()):
        kinds.add("lora_dropout")
    return f" ({', '.join(sorted(kinds))})" if kinds else None


def _acts(wrapper: Any) -> bool:
    """Whether a wrapper of peft's is on: not disabled, and it has what is active."""
    names = wrapper.active_adapters
    return not wrapper.disable_adapters and bool(names) and set(names) <= wrapper._adapters


def refuse_wrapped_head(model: Any, module: Any) -> None:
    """ValueError, with the module's name, for a head that is more than a weight and a bias."""

    def named(part: Any, default: str) -> str:
        names = {id(other): name for name, other in model.named_modules()}
        return f"{names.get(id(part), default)} of a {type(model).__name__}"

    for part in (model, *_layers(module)):
        for hook in _strange_hooks(part, forward=part is not model):
            where = named(part, "").removeprefix(" of ")
            raise ValueError(
                f"head: got the hook {hook} on {where}; expected none, since log-probs are "
                "computed from the head's weight and would pass it by. Remove it (torch's "
                "parametrizations take the place of weight_norm and of masks)."
            )
    for part in _layers(module):
        kind = f"{type(part).__module__}.{type(part).__qualname__}"
        if _is_peft(part):
            more = _more_than_lora(part)
            if more is not None and hasattr(part, "base_layer") and not _has_tokens(part):
                where = named(part, "the head")
                raise ValueError(
                    f"head: got the adapter {kind}{more} on {where}; expected a plain weight or "
                    "plain LoRA, since log-probs are computed from these and the adapter would "
                    "get no gradient. Take it out of target_modules, or what is in brackets out "
                    "of its config; modules_to_save trains the head as a whole."
                )
            continue
        weight = getattr(part, "weight", None)
        plain = isinstance(part, torch.nn.Linear) and type(part).forward is torch.nn.Linear.forward
        if not plain or not _is_matrix(weight):
            where = named(part, "the head")
            raise ValueError(
                f"head: got a {kind} with {_described(weight)} as {where}; expected a "
                "torch.nn.Linear with a floating-point weight [V, D]. Leave a quantised head in "
                "16 or 32 bits (modules_to_not_convert, llm_int8_skip_modules); no other kind is "
                "supported."
            )


def _layers(module: Any) -> Iterator[Any]:
    """The head and every layer behind peft's wrappers that may compute in its stead."""
    yield module
    parts = getattr(module, "_modules", {})
    if "modules_to_save" in parts:
        yield from _layers(module.original_module)
        for copy in module.modules_to_save.values():
            yield from _layers(copy)
    elif "token_adapter" in parts:
        yield from _layers(module.token_adapter)
    elif _has_tokens(module) or _is_lora(module):
        yield from _layers(module.base_layer)


def _has_tokens(part: Any) -> bool:
    return hasattr(part, "trainable_tokens_delta")


def _is_peft(part: Any) -> bool:
    parts = getattr(part, "_modules", {})
    return bool({"modules_to_save", "token_adapter", "base_layer"} & set(parts))


def _is_matrix(weight: Any) -> bool:
    """A floating-point matrix that torch multiplies as it stands (or a shard of one)."""
    kinds = (torch.Tensor, torch.nn.Parameter)
    sharded = hasattr(weight, "full_tensor")
    return (type(weight) in kinds or sharded) and weight.dim() == 2 and weight.is_floating_point()


def _described(weight: Any) -> str:
    if not isinstance(weight, torch.Tensor):
        return "no weight"
    return f"a weight {list(weight.shape)} ({type(weight).__name__}, {weight.dtype})"


def _strange_hooks(part: Any, *, forward: bool) -> Iterator[str]:
    """Names of hooks, and of a forward set on the object, that may change what it computes."""
    found = [hook for kind in HOOKS for hook in getattr(part, kind, {}).values()]
    if forward and "forward" in vars(part) and not hasattr(part, "_hf_hook"):
        found.append(part.forward)
    for hook in found:
        function = hook
        while isinstance(function, partial):
            function = function.func
        home = getattr(function, "__module__", None) or type(function).__module__
        if not home.startswith(KEEP_VALUES):
            yield f"{home}.{getattr(function, '__qualname__', type(function).__qualname__)}"

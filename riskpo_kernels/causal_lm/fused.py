"""A causal LM of transformers whose forward gives log-probs and entropy instead of logits.

The call is TRL's: `model(..., labels=labels, fused_lm_head=True)`. It passes through DDP, FSDP2,
peft and torch.compile like any forward. Inside it the decoder's last hidden states go to
linear_logprob; every other call is the model's own.
"""

from __future__ import annotations

import functools
import inspect
import types
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from riskpo_kernels.causal_lm.decoder import decoder_of, unwrapped
from riskpo_kernels.causal_lm.head import Head, find_head
from riskpo_kernels.causal_lm.head_weight import refuse_wrapped_head
from riskpo_kernels.core.checks import (
    BACKENDS,
    check_choice,
    check_flags,
    check_positive,
    reject,
)
from riskpo_kernels.linear_logprob import linear_logprob
from riskpo_kernels.reference import TokenLogProbs
from riskpo_kernels.sharding import full_weight

OP = "add_fused_lm_head"
OUTPUTS = ("log_probs", "entropy")
IGNORE = -100


class FusedLMHead:
    """The handle of one patch: `remove()`, or leave it as a context manager, and it is undone."""

    def __init__(self, model: Any, forward: Any) -> None:
        self._model, self._forward = model, forward
        self._before = vars(model).get("forward")
        model.forward = forward

    def remove(self) -> None:
        """Put the forward that was found back; a second call does nothing.

        RuntimeError where something else has wrapped the forward since.
        """
        if self._model is None:
            return
        if vars(self._model).get("forward") is not self._forward:
            raise RuntimeError(
                f"{OP}: got a {type(self._model).__name__} whose forward was wrapped again after "
                "the head was added; expected it as it was left. Undo what came later first."
            )
        if self._before is None:
            del self._model.forward
        else:
            self._model.forward = self._before
        self._model = None

    def __enter__(self) -> FusedLMHead:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


@dataclass(frozen=True)
class _Call:
    """How the head is computed. No module of the model is held: a copy of it finds its own."""

    formula: Head
    settings: dict[str, Any]
    float32: bool
    arguments: tuple[str, ...]  # of the model's forward, in their order


def add_fused_lm_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = OUTPUTS,
    *,
    backend: str = "auto",
    memory_mib: float = 300,
    tail_eps: float | None = None,
    deterministic: bool = False,
    head: Head | None = None,
) -> FusedLMHead:
    """Let `model(..., labels=labels, fused_lm_head=True)` give log-probs without logits.

    Arguments, call and results are those of TRL's function of this name. Other calls, generation
    among them, stay the model's own. Call it before DDP and FSDP2 wrap the model, and before or
    after peft and torch.compile do.

    Args:
        model: a causal LM of transformers, perhaps inside peft's or torch.compile's wrapper.
        temperature: the logits are divided by it.
        cast_lm_head_to_fp32: multiply in float32. Otherwise in the weights' dtype, or autocast's,
            accumulated in float32 either way.
        outputs: the fields that are computed, of "log_probs" (always) and "entropy".
        backend, memory_mib, tail_eps, deterministic: as in linear_logprob. bfloat16 heads drop
            blocks of the vocabulary below 2^-14 from the gradient; tail_eps=0 is exact.
        head: what riskpo_kernels.causal_lm.find_head gave for a model of this kind, where this
            one cannot be tried (no weights yet).

    Returns:
        A handle: `handle.remove()`, or `with add_fused_lm_head(model):`, undoes it.

        The call takes labels [B, T], which it shifts, or shift_labels [B, T], and optionally
        num_items_in_batch. It returns `loss`, the mean negative log-likelihood; `log_probs` and
        `entropy`, float32 [B, T - 1] ([B, T] of shift_labels), 0 where the label is -100, each
        with its gradient; and `label_mask`.

    Raises:
        ValueError: a head whose logits are not softcap(scale * (h W^T + bias)) of the decoder's
            output, found by trying it on the model; another adapter than LoRA on the head; virtual
            tokens; a field that is not computed; a value that an option cannot have. In the call:
            neither kind of labels, router losses, logits_to_keep.
    """
    if not hasattr(model, "get_output_embeddings") and not hasattr(model, "_orig_mod"):
        todo = "Call it before DDP wraps the model, or give it model.module."
        reject(OP, f"a {type(model).__name__}", "a causal language model of transformers", todo)
    for name in outputs:
        if name not in OUTPUTS:
            reject(OP, f"outputs with {name!r}", " and ".join(OUTPUTS), "Keep TRL's head for it.")
    check_positive(OP, "temperature", temperature)
    check_positive(OP, "memory_mib", memory_mib)
    check_choice(OP, "backend", backend, BACKENDS)
    check_flags(OP, cast_lm_head_to_fp32=cast_lm_head_to_fp32, deterministic=deterministic)
    if tail_eps is not None:
        check_positive(OP, "tail_eps", tail_eps, zero_ok=True)
    model = unwrapped(model)
    settings = {
        "temperature": temperature,
        "return_entropy": "entropy" in outputs,
        "backend": backend,
        "memory_mib": memory_mib,
        "tail_eps": tail_eps,
        "deterministic": deterministic,
    }
    own = type(model).forward
    arguments = tuple(inspect.signature(own).parameters)[1:]
    found = find_head(model) if head is None else head
    call = _Call(Head(None, found.options, found.rows), settings, cast_lm_head_to_fp32, arguments)
    before = vars(model).get("forward", own)
    before = getattr(before, "__func__", before)
    bound = vars(model).get("forward") is before  # a partial of accelerate's, say

    # generate() reads the signature of forward through __wrapped__
    @functools.wraps(own)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **given: Any) -> Any:
        if fused_lm_head:
            return _score(self, call, dict(zip(call.arguments, args, strict=False)) | given)
        return before(*args, **given) if bound else before(self, *args, **given)

    return FusedLMHead(model, types.MethodType(forward, model))


def _score(model: Any, call: _Call, given: dict[str, Any]) -> Any:
    """The decoder's hidden states through linear_logprob."""
    from riskpo_kernels.causal_lm.output import FusedCausalLMOutput

    labels, shifted, items = (
        given.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch")
    )
    _refuse(model, labels, shifted, given)
    hidden = decoder_of(model)(**given | {"use_cache": False}).last_hidden_state
    # The labels move, not the hidden states: a slice of those would be a copy.
    target = shifted
    if shifted is None:
        target = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    token = _log_probs(call, model.get_output_embeddings(), hidden, target)
    rows = slice(None) if shifted is not None else slice(0, -1)
    # copies of [B, T - 1]: FSDP cannot hook a view
    logprob = token.logprob[:, rows].contiguous()
    entropy = None if token.entropy is None else token.entropy[:, rows].contiguous()
    mask = target[:, rows].to(logprob.device) != IGNORE
    loss = -logprob.sum() / (mask.sum().clamp(min=1) if items is None else items)
    return FusedCausalLMOutput(loss=loss, log_probs=logprob, entropy=entropy, label_mask=mask)


def _refuse(model: Any, labels: Any, shifted: Any, given: dict[str, Any]) -> None:
    """ValueError for a call, or a head that came later, whose numbers would be other ones."""
    if (labels is None) == (shifted is None):
        came = "no labels" if labels is None else "labels and shift_labels"
        reject(OP, came, "one of labels and shift_labels", "Pass labels=input_ids, say.")
    text = model.config.get_text_config()
    router = given.pop("output_router_logits", getattr(text, "output_router_logits", False))
    if router:
        todo = "Pass output_router_logits=False; this call has no part for it in its loss."
        reject(OP, "router logits with fused_lm_head=True", "a loss of labels alone", todo)
    if given.pop("logits_to_keep", 0):
        todo = "Set the labels of the other positions to -100: they cost nothing."
        reject(OP, "logits_to_keep with fused_lm_head=True", "labels alone", todo)
    if given.pop("return_dict", True) is False:
        reject(OP, "return_dict=False", "an output with named fields", "Leave it out.")
    refuse_wrapped_head(model, model.get_output_embeddings())


def _log_probs(
    call: _Call, module: Any, hidden: torch.Tensor, target: torch.Tensor
) -> TokenLogProbs:
    """linear_logprob with the head as it is now, in the dtype in which it would multiply."""
    head = Head(module, call.formula.options, call.formula.rows)
    # a head that FSDP2 shards as a module of its own: one gather per forward
    weight, given = full_weight(head.weight), head.keywords
    hidden = hidden.to(weight.device)
    device = hidden.device.type
    if call.float32:
        hidden, weight = hidden.float(), weight.float()
    elif torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if given["bias"] is not None:
        given["bias"] = full_weight(given["bias"]).to(weight.dtype)
    if given["lora"] is not None:
        a, b, factor = given["lora"]
        a, b = (full_weight(x).to(torch.promote_types(x.dtype, hidden.dtype)) for x in (a, b))
        given["lora"] = a, b, factor
    target = target.to(hidden.device)
    with torch.autocast(device, enabled=False) if call.float32 else nullcontext():
        return linear_logprob(hidden, weight, target, ignore_index=IGNORE, **given, **call.settings)

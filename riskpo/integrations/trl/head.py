"""`linear_logprob` as the log-prob and entropy path of a TRL GRPOTrainer.

TRL asks its model for log-probs with `model(..., labels=labels, fused_lm_head=True)`. That call is
the seam: it passes through the DDP, FSDP and PEFT wrappers like any forward, and only there is the
head computed differently. Generation and every other forward are the model's own.
"""

from __future__ import annotations

import functools
import logging
import types
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from riskpo.model.decoder import decoder_of, unwrapped
from riskpo.model.lm_head import Head, find_head
from riskpo_kernels import full_weight, linear_logprob

IGNORE = -100
OP = "use_riskpo_head"
log = logging.getLogger("riskpo")


def use_riskpo_head(
    trainer: GRPOTrainer,
    *,
    backend: str = "auto",
    memory_mib: float = 300,
    tail_eps: float | None = None,
    deterministic: bool = False,
) -> None:
    """Compute the log-probs and entropies of `trainer` with riskpo_kernels.linear_logprob.

    Call it once, between building the trainer and `train()`. Policy, old and reference log-probs
    all take the new path, at the trainer's temperature and with the scale, softcap and bias that
    the model's config names and a probe of eight tokens confirms. Under autocast the products are
    those of its dtype, accumulated in float32, unless `cast_lm_head_to_fp32` is set.

    The keywords are those of linear_logprob. bfloat16 heads drop blocks of the vocabulary below
    2^-14 from the gradient by default; tail_eps=0 is exact.

    ValueError for what this path does not compute: an adapter of products on the head (LoRA;
    modules_to_save and trainable tokens are computed), virtual tokens, a mixture of experts
    with its auxiliary loss, images, DeepSpeed ZeRO-3, a head the formula does not describe.
    """
    _refuse(trainer)
    float32: bool = trainer.args.cast_lm_head_to_fp32  # type: ignore[attr-defined]
    head = _head(trainer.model)
    model = unwrapped(trainer.model)
    settings = {
        "temperature": trainer.temperature,
        "backend": backend,
        "memory_mib": memory_mib,
        "tail_eps": tail_eps,
        "deterministic": deterministic,
    }
    _patch(model, head, settings, float32)
    if trainer.ref_model is not None:  # built from the policy's own checkpoint: the same formula
        reference = trainer.accelerator.unwrap_model(trainer.ref_model)
        _patch(
            reference, replace(head, module=reference.get_output_embeddings()), settings, float32
        )
    log.info("%s: %s with %s, %s", OP, type(model).__name__, settings, head.options)


def _refuse(trainer: GRPOTrainer) -> None:
    if not isinstance(trainer, GRPOTrainer):
        _reject(f"a {type(trainer).__name__}", "a trl.GRPOTrainer", "Build the trainer first.")
    if trainer._is_vlm:
        _reject("a model that takes images", "a text model", "Keep TRL's own head for it.")
    if trainer.aux_loss_enabled:
        todo = "Set router_aux_loss_coef=0.0, or keep TRL's own head."
        _reject("a router auxiliary loss", "a loss of log-probs alone", todo)
    if is_deepspeed_zero3_enabled():
        todo = "Use ZeRO-2 or FSDP, or keep TRL's own head."
        _reject("DeepSpeed ZeRO-3", "a head that is whole in the backward too", todo)


def _head(model: Any) -> Head:
    """Verified on the model's own logits; ranks without weights yet are told. All raise or none."""
    module = unwrapped(model).get_output_embeddings()
    holds = module is None or not any(p.is_meta for p in module.parameters())
    found: Head | None = None
    error: str | None = None
    try:
        found = find_head(model) if holds else None
    except ValueError as raised:
        error = str(raised)
    told = [(None if found is None else (found.options, found.rows), error)]
    if dist.is_available() and dist.is_initialized():
        told *= dist.get_world_size()
        dist.all_gather_object(told, told[0])
    error = next((text for _, text in told if text is not None), None)
    if error is not None:
        raise ValueError(f"{OP}: {error}")
    options, rows = next(formula for formula, _ in told if formula is not None)
    return Head(module, options, rows)


def _patch(model: Any, head: Head, settings: dict[str, Any], float32: bool) -> None:
    host_forward = model.forward

    # generate() reads the signature of forward through __wrapped__
    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return host_forward(*args, **kwargs)
        return _score(self, args, kwargs, head, settings, float32)

    model.forward = types.MethodType(forward, model)


def _score(
    model: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    head: Head,
    settings: dict[str, Any],
    float32: bool,
) -> FusedCausalLMOutput:
    """log_probs and entropy [B, T - 1] of labels [B, T], 0 where the label is -100."""
    labels = kwargs.pop("labels")
    for name in ("shift_labels", "num_items_in_batch", "output_router_logits"):
        if kwargs.pop(name, None) is not None:
            todo = "Only GRPOTrainer's own loss takes this path."
            _reject(f"{name} with fused_lm_head=True", "labels alone", todo)
    hidden = decoder_of(model)(*args, **kwargs, use_cache=False).last_hidden_state
    # The labels move, not the hidden states: a slice of those would be a copy.
    target = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    # a head that FSDP2 shards as a module of its own; one gather per forward
    bias, weight = None if head.bias is None else full_weight(head.bias), full_weight(head.weight)
    hidden, weight = _as_computed(hidden.to(weight.device), weight, float32)
    device = hidden.device.type
    with torch.autocast(device, enabled=False) if float32 else nullcontext():
        token = linear_logprob(
            hidden,
            weight,
            target.to(hidden.device),
            bias=None if bias is None else bias.to(weight.dtype),
            return_entropy=True,
            ignore_index=IGNORE,
            **asdict(head.options),
            **settings,
        )
    assert token.entropy is not None  # asked for
    mask = target[:, :-1] != IGNORE
    # copies of [B, T - 1]: FSDP cannot hook a view
    logprob, entropy = (x[:, :-1].contiguous() for x in (token.logprob, token.entropy))
    return FusedCausalLMOutput(log_probs=logprob, entropy=entropy, label_mask=mask)


def _as_computed(
    hidden: torch.Tensor, weight: torch.Tensor, float32: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the dtype in which the model's own head would multiply them."""
    device = hidden.device.type
    if float32:
        return hidden.float(), weight.float()
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


def _reject(came: str, expected: str, todo: str) -> None:
    raise ValueError(f"{OP}: got {came}; expected {expected}. {todo}")

"""Log-probs and entropies of a TRL GRPOTrainer by `linear_logprob`.

TRL asks its model for log-probs with `model(..., labels=labels, fused_lm_head=True)`, which passes
through DDP, FSDP and PEFT wrappers like any forward. Only that call is computed differently;
generation and every other forward are the model's own.
"""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import GRPOTrainer

from riskpo_kernels.causal_lm import Head, add_fused_lm_head, find_head, unwrapped

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
    are all computed so, at the trainer's temperature, with the scale, softcap and bias that the
    model's config names and a probe of eight tokens confirms. Under autocast the products take its
    dtype and accumulate in float32, unless `cast_lm_head_to_fp32` is set.

    The keywords are those of linear_logprob. bfloat16 heads drop blocks of the vocabulary below
    2^-14 from the gradient by default; tail_eps=0 is exact.

    modules_to_save and trainable tokens are supported. ValueError for another adapter on the head
    (TRL itself refuses LoRA there), virtual tokens, a router's auxiliary loss, images, DeepSpeed
    ZeRO-3, and a head that is not softcap(scale * (h W^T + bias)).
    """
    _refuse(trainer)
    head = _head(trainer.model)
    model = unwrapped(trainer.model)
    settings = {
        "temperature": trainer.temperature,
        "cast_lm_head_to_fp32": trainer.args.cast_lm_head_to_fp32,  # type: ignore[attr-defined]
        "backend": backend,
        "memory_mib": memory_mib,
        "tail_eps": tail_eps,
        "deterministic": deterministic,
        "head": head,
    }
    add_fused_lm_head(model, **settings)
    if trainer.ref_model is not None:  # built from the policy's own checkpoint: the same formula
        add_fused_lm_head(trainer.accelerator.unwrap_model(trainer.ref_model), **settings)
    log.info("%s: %s with %s", OP, type(model).__name__, settings)


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
    """The head, verified on the model's own logits; ranks that hold no weights yet are told of it.

    If one rank raises, all do.
    """
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


def _reject(came: str, expected: str, todo: str) -> None:
    raise ValueError(f"{OP}: got {came}; expected {expected}. {todo}")

"""riskpo_loss and riskpo_loss_from_logits: the two references, one after the other."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from riskpo_kernels.reference.logprob import TokenLogProbs, linear_logprob, logits_logprob
from riskpo_kernels.reference.surrogate import SurrogateLoss, clipped_surrogate


def riskpo_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    old_logprob: torch.Tensor | None,
    advantage: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    **options: Any,
) -> SurrogateLoss:
    """clipped_surrogate(linear_logprob(hidden, weight, target), ...); a token counts where mask
    and target != ignore_index both hold."""
    counted = _counted(target, mask, options)
    ours = _those_of(linear_logprob, options)
    token = linear_logprob(hidden, weight, _ignore(target, counted, options), **ours)
    return _surrogate(token, old_logprob, advantage, cu_seqlens, counted, options)


def riskpo_loss_from_logits(
    logits: torch.Tensor,
    target: torch.Tensor,
    old_logprob: torch.Tensor | None,
    advantage: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    **options: Any,
) -> SurrogateLoss:
    """clipped_surrogate(logits_logprob(logits, target), ...)."""
    counted = _counted(target, mask, options)
    ours = _those_of(logits_logprob, options)
    token = logits_logprob(logits, _ignore(target, counted, options), **ours)
    return _surrogate(token, old_logprob, advantage, cu_seqlens, counted, options)


def _counted(
    target: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]
) -> torch.Tensor:
    counted = torch.ones_like(target, dtype=torch.bool) if mask is None else mask != 0
    ignore = options.get("ignore_index", -100)
    return counted if ignore is None else counted & (target != ignore)


def _ignore(target: torch.Tensor, counted: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    ignore = options.get("ignore_index", -100)
    return target if ignore is None else target.masked_fill(~counted, ignore)


def _those_of(op: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    names = inspect.signature(op).parameters
    ours = {k: v for k, v in options.items() if k in names}
    wants = options.get("return_entropy", False) or options.get("entropy_coef", 0.0) != 0
    return ours | {"return_entropy": wants}


def _surrogate(
    token: TokenLogProbs,
    old_logprob: torch.Tensor | None,
    advantage: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    counted: torch.Tensor,
    options: dict[str, Any],
) -> SurrogateLoss:
    names = inspect.signature(clipped_surrogate).parameters
    theirs = {k: v for k, v in options.items() if k in names}
    return clipped_surrogate(
        token.logprob,
        token.logprob.detach() if old_logprob is None else old_logprob,
        advantage,
        cu_seqlens=cu_seqlens,
        mask=counted,
        entropy=token.entropy,
        **theirs,
    )

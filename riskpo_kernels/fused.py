"""Hidden states, or logits, to the policy loss in one call: log-probs, then the surrogate."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from riskpo_kernels.core.checks import check_constant, check_shape, reject
from riskpo_kernels.linear_logprob import linear_logprob
from riskpo_kernels.logits_logprob import logits_logprob
from riskpo_kernels.reference import SurrogateLoss
from riskpo_kernels.surrogate import clipped_surrogate


def _keywords(op: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(op).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


# looked up once, at import: torch.compile cannot follow a look at a signature
OPTIONS = {op: _keywords(op) for op in (linear_logprob, logits_logprob)}
SURROGATE_OPTIONS = _keywords(clipped_surrogate) - {"cu_seqlens", "mask", "entropy"}


def _split(name: str, options: dict[str, Any], op: Callable[..., Any]) -> tuple[dict, dict]:
    """Options of the log-prob op and of clipped_surrogate; backend goes to both."""
    first, second = OPTIONS[op], SURROGATE_OPTIONS
    for key in options:
        if key not in first | second:
            near = difflib.get_close_matches(key, first | second, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{name}() got an unexpected option {key!r}{hint}")
    return (
        {k: v for k, v in options.items() if k in first},
        {k: v for k, v in options.items() if k in second},
    )


def _loss(
    name: str,
    op: Callable[..., Any],
    inputs: tuple[torch.Tensor, ...],
    target: torch.Tensor,
    old_logprob: torch.Tensor | None,
    advantage: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    options: dict[str, Any],
) -> SurrogateLoss:
    ours, theirs = _split(name, options, op)
    if old_logprob is not None:
        check_shape(name, "old_logprob", old_logprob, tuple(target.shape), "one per target")
    if mask is not None:
        check_shape(name, "mask", mask, tuple(target.shape), "one per target")
        check_constant(name, mask=mask)
    ignore = ours.get("ignore_index", -100)
    counted = torch.ones_like(target, dtype=torch.bool) if mask is None else mask != 0
    if ignore is not None:
        counted = counted & (target != ignore)
        target = target.masked_fill(~counted, ignore)
    wants = ours.pop("return_entropy", False) or theirs.get("entropy_coef", 0.0) != 0
    token = op(*inputs, target, return_entropy=wants, **ours)
    return clipped_surrogate(
        token.logprob,
        token.logprob.detach() if old_logprob is None else old_logprob,
        advantage,
        cu_seqlens=cu_seqlens,
        mask=counted,
        entropy=token.entropy,
        **theirs,
    )


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
    """The clipped policy loss (to minimise) straight from hidden states.

    Args:
        hidden: [N, D] packed, with cu_seqlens [S+1]; or padded [B, T, D], with mask [B, T].
        weight: [V, D] head.
        target: [N] or [B, T] ids of the tokens taken, already shifted.
        old_logprob: like target, float; log-probs of the behaviour policy at the same temperature.
            None: on-policy, they are the new ones and every ratio is exactly 1. This, advantage,
            mask and what options holds for clipped_surrogate must not require grad.
        advantage: [S] or [B] per sequence, or like target for ratio="token"; detached.
        mask: like target; a token counts where mask and target != ignore_index both hold. Others
            cost nothing and are never read (with ignore_index=None a masked token costs its
            forward).
        options: every keyword of linear_logprob (bias, temperature, softcap, memory_mib, ...) and
            of clipped_surrogate (ratio, clip_low, clip_high, aggregate, kl_coef, ...). The
            defaults are the paper's: sequence ratio, sequence mean (arXiv 2510.00911, objective).

    Returns:
        SurrogateLoss(loss, stats). The entropy is computed iff entropy_coef != 0 or return_entropy.

    Raises:
        ValueError: as linear_logprob and clipped_surrogate. TypeError: an unknown option.
    """
    if hidden.shape[:-1] != target.shape:
        came = f"hidden {list(hidden.shape)} with target {list(target.shape)}"
        reject("riskpo_loss", came, "target [...] for hidden [..., D]", "Shift and slice both.")
    return _loss(
        "riskpo_loss",
        linear_logprob,
        (hidden, weight),
        target,
        old_logprob,
        advantage,
        cu_seqlens,
        mask,
        options,
    )


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
    """riskpo_loss for code that already has logits [N, V] or [B, T, V], whole or chunk by chunk.

    A chunk of a larger batch passes the global `denominator`; chunks must hold whole sequences
    when ratio="sequence". Options are those of logits_logprob and clipped_surrogate.
    """
    return _loss(
        "riskpo_loss_from_logits",
        logits_logprob,
        (logits,),
        target,
        old_logprob,
        advantage,
        cu_seqlens,
        mask,
        options,
    )

"""clipped_surrogate: from per-token log-probs to the policy loss; sequence_logprob: their sums.

The operator that PyTorch sees is in policy_loss/operator.py: one pass makes the loss and its slopes
with respect to logprob and entropy; backward multiplies them by the upstream scalar. Memory beside
the inputs: 8 bytes per token with an entropy bonus, else 4 (Triton), or a few such buffers (torch).
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from riskpo_kernels.core.backends import BACKENDS
from riskpo_kernels.core.checks import check_choice, reject
from riskpo_kernels.core.checks import constant as guarded
from riskpo_kernels.core.matmul import no_autocast
from riskpo_kernels.core.process_groups import name_of
from riskpo_kernels.policy_loss.checks import (
    Options,
    check_bounds,
    check_layout,
    check_options,
    check_tensors,
)
from riskpo_kernels.policy_loss.operator import OP, STATS, surrogate_operator
from riskpo_kernels.reference import surrogate as reference
from riskpo_kernels.reference.surrogate import SurrogateLoss

# by name, for torch 2.11's Dynamo does not trace vars()
WORDS = tuple(field.name for field in fields(Options) if field.name != "denominator")


def sequence_logprob(
    logprob: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reduce: str = "sum",
) -> torch.Tensor:
    """Log-prob of each sequence: the sum or the mean of its counted tokens' log-probs.

    logprob     flat [N] with cu_seqlens, or padded [B, T] with mask; nats, any float dtype
    cu_seqlens  int32 or int64 [S + 1] from 0 to N, non-decreasing
    mask        shape of logprob, bool, int or float; nonzero counts, the rest is never read
    reduce      "sum" or "mean"; the mean is log s of arXiv 2510.00911 sec. 4 (GSPO, arXiv
                2507.18071 eq. 7) up to the difference between two policies

    Returns [S] (padded: [B]), nats, at least float32; 0 for a sequence without counted tokens;
    differentiable. Raises ValueError where shapes, dtypes, devices or words do not fit.
    """
    op = "sequence_logprob"
    check_choice(op, "reduce", reduce, ("sum", "mean"))
    if check_layout(op, logprob, cu_seqlens, mask) is None:
        reject(op, "flat tokens without cu_seqlens", "cu_seqlens [S + 1]", "Say where they end.")
    if cu_seqlens is not None and not torch.compiler.is_compiling():  # a graph cannot look
        check_bounds(op, cu_seqlens, logprob.numel())
    return reference.sequence_logprob(logprob, cu_seqlens=cu_seqlens, mask=mask, reduce=reduce)


def clipped_surrogate(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    ratio: str = "sequence",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    correction: torch.Tensor | None = None,
    ref_logprob: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    aggregate: str = "sequence-mean",
    constant: float | None = None,
    denominator: float | torch.Tensor | None = None,
    advantage_per: str | None = None,
    correction_per: str | None = None,
    sequence_group: Any = None,
    backend: str = "auto",
) -> SurrogateLoss:
    """Clipped policy loss to minimise: surrogate + kl_coef * KL - entropy_coef * entropy.

    Differentiable, once, in logprob and entropy. Every other tensor is a constant, and one that
    requires grad is refused: on-policy code passes old_logprob=logprob.detach(). A masked token
    never counts and its values (NaN, inf) are never read into a result. Nor is what has coefficient
    0: ref_logprob with kl_coef=0, entropy with entropy_coef=0, the ratio of a token (of a sequence)
    whose advantage or correction is 0, and of these two the other. What is used and NaN makes the
    loss NaN.

    logprob, old_logprob    [N] flat, or [B, T] padded with a mask; nats, any float dtype. Computed
                            in float32 (float64 for float64); gradients come in the input's dtype.
    advantage               [S] (padded: [B]) per sequence, or per token for ratio="token";
                            floating, without grad.
    advantage_per,          "sequence" or "token": needed where flat tokens have S == N and not
    correction_per          every sequence is one token, for there the shape does not tell.
    cu_seqlens              int32 or int64 [S + 1] from 0 to N, non-decreasing; flat tokens only.
                            Its check is the only wait for the device (sequence_group: a few more).
    mask                    shape of logprob, bool, int or float; nonzero counts.
    ratio                   "sequence": exp of the mean log-ratio over the sequence's counted
                            tokens, clamped to +-10 (arXiv 2510.00911 sec. 4; GSPO, arXiv
                            2507.18071); needs sequences. Every token then has its sequence's term.
                            "token": exp of the token's log-ratio, clamped to +-20 (PPO, arXiv
                            1707.06347). The slope is 0 beyond the clamps.
    clip_low, clip_high     ratio held to [1 - low, 1 + high] (DAPO's two bounds, arXiv 2503.14476);
                            default 3e-4 / 4e-4 for the sequence ratio, 0.2 / 0.2 for the token's.
    dual_clip               c > 1: where the advantage is negative the surrogate is at most
                            -c * advantage (arXiv 1912.09729).
    correction              [S] or per token, not negative: sampler-mismatch weight of the
                            surrogate alone. Per token under the sequence ratio its mean acts.
    ref_logprob, kl_coef    KL to the reference policy from u = ref_logprob - logprob, clamped to
    kl                      +-20: "k1" -u, "k2" u^2 / 2, "k3" exp(u) - 1 - u (J. Schulman,
                            "Approximating KL divergence"). The gradient is that of this value:
                            in expectation over the policy's own samples that of k1 is 0, and that
                            of k2, not of k3, is the gradient of KL(policy, reference).
    entropy, entropy_coef   shape of logprob, nats; without gradient where entropy_coef is 0.
    aggregate, denominator  the sum over counted tokens of weight * (surrogate + KL - entropy
                            terms) over the denominator, by default (the number of sequences S
                            includes empty ones):
          "sequence-mean"      weight 1 / length    S; under the sequence ratio the papers' mean of
                                                    one term per sequence
          "token-mean"         weight 1             counted tokens (DAPO)
          "sequence-sum"       weight 1             S
          "sequence-sum-norm"  weight 1             S * constant (Dr. GRPO, arXiv 2503.20783)
                            denominator, a number or a detached 0-d tensor, replaces it: give the
                            global one when a batch is split over micro-batches or ranks. A
                            denominator of 0, number or tensor, counts as 1: nothing was counted
                            anywhere, so the loss is 0. A tensor below 0 makes the loss NaN.
    sequence_group          process group whose ranks hold different tokens of the same sequences
                            (sequence or context parallelism): cu_seqlens, or the rows of a padded
                            batch, are this rank's parts of the same S sequences in the same order,
                            some perhaps empty; advantage [S] is whole. Lengths, log-ratio means,
                            token counts and stats are those of all ranks; loss is this rank's
                            share: the shares add up to the unsharded loss, and each rank's
                            gradients are that loss's. Backends torch and reference.
    backend                 see riskpo_kernels.core.backends.

    Returns (loss, stats): loss 0-d; stats detached 0-d tensors, made without waiting for the
    device. clip_low_fraction and clip_high_fraction: share of tokens (of non-empty sequences for
    the sequence ratio) whose gradient the bound cuts; clip_fraction: the same with dual_clip's;
    ratio_mean, ratio_max over the same units; zero_coefficient_fraction: share of tokens whose
    slopes are all exactly 0; tokens: how many count; kl (with ref_logprob) and entropy (with
    entropy): means over tokens. Values that are NaN and have coefficient 0 are left out of the
    means and the maximum. Nothing to count gives zeros.

    Raises ValueError where shapes, dtypes, devices, words or numbers do not fit, or a constant
    requires grad.
    """
    sequences = check_layout(OP, logprob, cu_seqlens, mask)
    options = Options(
        ratio=ratio,
        clip_low=guarded(clip_low),
        clip_high=guarded(clip_high),
        dual_clip=guarded(dual_clip),
        kl_coef=guarded(kl_coef),
        kl=kl,
        entropy_coef=guarded(entropy_coef),
        aggregate=aggregate,
        constant=guarded(constant),
        advantage_per=advantage_per,
        correction_per=correction_per,
        denominator=guarded(denominator),
    )
    per_token = {"old_logprob": old_logprob, "ref_logprob": ref_logprob, "entropy": entropy}
    check_options(OP, options)
    check_tensors(OP, options, logprob, sequences, advantage, correction, **per_token)
    check_choice(OP, "backend", backend, BACKENDS)
    group = name_of(OP, "sequence_group", sequence_group)
    if backend == "reference" or (logprob.numel() == 0 and not group):
        if cu_seqlens is not None:
            check_bounds(OP, cu_seqlens, logprob.numel())
        with no_autocast(logprob.device):
            return reference.clipped_surrogate(
                logprob,
                old_logprob,
                advantage,
                cu_seqlens=cu_seqlens,
                mask=mask,
                correction=correction,
                ref_logprob=ref_logprob,
                entropy=entropy,
                sequence_group=sequence_group,
                **vars(options),
            )
    is_tensor = isinstance(denominator, torch.Tensor)
    words = [getattr(options, name) for name in WORDS]
    loss, values, tokens, *_ = surrogate_operator(
        logprob,
        entropy.detach() if entropy is not None and options.entropy_coef == 0 else entropy,
        old_logprob,
        advantage,
        correction,
        ref_logprob,
        mask,
        cu_seqlens,
        denominator if is_tensor else None,
        group,
        backend,
        *words,
        None if is_tensor else options.denominator,
    )
    stats = dict(zip(STATS, values.unbind(), strict=True))
    absent = {"kl": ref_logprob is None, "entropy": entropy is None}
    stats = {name: x for name, x in stats.items() if not absent.get(name, False)}
    return SurrogateLoss(loss, stats | {"tokens": tokens})

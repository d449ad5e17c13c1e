"""clipped_surrogate: from per-token log-probs to the policy loss; sequence_logprob: their sums.

The formulas are in policy_loss/formulas.py, the operator that PyTorch sees in
policy_loss/operator.py: one pass makes the loss and its slopes with respect to logprob and entropy;
backward multiplies them by the upstream scalar. Between the two it keeps 4 bytes per token, 8 with
an entropy bonus; while it runs, some twenty such arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from riskpo_kernels.core.checks import BACKENDS, check_choice, reject
from riskpo_kernels.core.checks import constant as guarded
from riskpo_kernels.core.operators import no_autocast
from riskpo_kernels.core.process_groups import name_of
from riskpo_kernels.policy_loss.checks import (
    WORDS,
    Options,
    check_bounds,
    check_layout,
    check_options,
    check_tensors,
    settings_of,
)
from riskpo_kernels.policy_loss.operator import STATS, surrogate_operator
from riskpo_kernels.policy_loss.sequences import OP, Sequences, is_per_token
from riskpo_kernels.reference import surrogate as reference
from riskpo_kernels.reference.surrogate import SurrogateLoss


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
    s = Sequences.of(logprob, cu_seqlens, mask)
    x = s.tokens(logprob, torch.promote_types(logprob.dtype, torch.float32))
    return s.mean(x) if reduce == "mean" else s.sum(x)


def clipped_surrogate(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    loss: str = "clip",
    loss_options: Mapping[str, float] | None = None,
    ratio: str = "sequence",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    off_policy_mask_threshold: float | None = None,
    correction: torch.Tensor | None = None,
    ref_logprob: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    aggregate: str = "sequence-mean",
    constant: float | None = None,
    prompt_tokens: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
    advantage_per: str | None = None,
    correction_per: str | None = None,
    sequence_group: Any = None,
    backend: str = "auto",
) -> SurrogateLoss:
    """A policy loss to minimise: surrogate + kl_coef * KL - entropy_coef * entropy.

    Differentiable, once, in logprob and entropy. Every other tensor is a constant, and one that
    requires grad is refused: on-policy code passes old_logprob=logprob.detach().

    A masked token never counts, and its values (NaN, inf) reach no result. Neither does what has
    coefficient 0: ref_logprob with kl_coef=0; entropy with entropy_coef=0; the ratio of a token (of
    a sequence) whose advantage or correction is 0. A NaN that is used makes the loss NaN.

    logprob, old_logprob    [N] flat, or [B, T] padded with a mask; nats, any float dtype. Computed
                            in float32 (float64 for float64); gradients come in the input's dtype.
    advantage               [S] (padded: [B]) per sequence, or per token for ratio="token";
                            floating, without grad.
    advantage_per,          "sequence" or "token". Needed where the shape does not tell: flat tokens
    correction_per          with S == N, some sequences longer than one token.
    cu_seqlens              int32 or int64 [S + 1] from 0 to N, non-decreasing; flat tokens only.
                            Its check is the only wait for the device (sequence_group: a few more).
    mask                    shape of logprob, bool, int or float; nonzero counts.
    loss                    the surrogate, of the ratio r and the advantage a
          "clip"      -min(r a, clip(r) a); the clip bounds default to 3e-4 / 4e-4 for the sequence
                      ratio, 0.2 / 0.2 for the token's (PPO, DAPO, GSPO, RiskPO)
          "cispo"     -stop_gradient(clip(r)) a logprob; by default r at most 5 (arXiv 2506.13585)
          "icepop"    -r a, 0 where r is outside [0.5, 5]: a two-sided mask (arXiv 2510.18855)
          "sapo"      -(4 / tau) sigmoid(tau (r - 1)) a; tau_pos 1, tau_neg 1.05 (arXiv 2511.20347)
          "gmpo"      -r a, r the geometric mean of token ratios whose logarithms are held to
                      -0.4 .. 0.4 one by one; ratio="sequence" alone (arXiv 2507.20673)
                            policy_loss/formulas.py has them on one page.
    clip_low, clip_high     ratio held to [1 - low, 1 + high] (DAPO's two bounds, arXiv 2503.14476);
                            for "gmpo" the log-ratio to [-low, high].
    dual_clip               of "clip", c > 1: where the advantage is negative the surrogate is at
                            most -c * advantage (arXiv 1912.09729).
    loss_options            settings of the loss by name, such as {"tau_neg": 1.05}; also the three
                            above.
    ratio                   "sequence": exp of the mean log-ratio over the sequence's counted
                            tokens, clamped to +-10 (arXiv 2510.00911 sec. 4; GSPO, arXiv
                            2507.18071); needs sequences. Every token then has its sequence's term.
                            "token": exp of the token's log-ratio, clamped to +-20 (PPO, arXiv
                            1707.06347). The slope is 0 beyond the clamps.
    off_policy_mask_threshold
                            in nats: a sequence whose mean of old_logprob - logprob is above it has
                            no surrogate where its advantage is negative (DeepSeek-V3.2, arXiv
                            2512.02556). Needs sequences.
    correction              [S] or per token, not negative: sampler-mismatch weight of the
                            surrogate alone. Per token under the sequence ratio its mean acts.
    ref_logprob, kl_coef    KL to the reference policy from u = ref_logprob - logprob, clamped to
    kl                      +-20: "k1" -u, "k2" u^2 / 2, "k3" exp(u) - 1 - u (J. Schulman,
                            "Approximating KL divergence"), "k3+" the value of k3 with the gradient
                            of k2, "k3-unbiased" the token's ratio times k3. In expectation over the
                            policy's own samples the gradients of k2, k3+ and k3-unbiased are that
                            of KL(policy, reference); k1's is 0, and k3's is another. k3-unbiased
                            holds over the old policy's samples too.
    entropy, entropy_coef   shape of logprob, nats; without gradient where entropy_coef is 0.
    aggregate, denominator  the sum over counted tokens of weight * (surrogate + KL - entropy
                            terms) over the denominator, by default (the number of sequences S
                            includes empty ones):
          "sequence-mean"      weight 1 / length    S; under the sequence ratio the papers' mean of
                                                    one term per sequence
          "token-mean"         weight 1             counted tokens (DAPO)
          "prompt-mean"        1 / prompt_tokens    prompts (ScaleRL, arXiv 2510.13786)
          "sequence-sum"       weight 1             S
          "sequence-sum-norm"  weight 1             S * constant (Dr. GRPO, arXiv 2503.20783)
                            denominator, a number or a detached 0-d tensor, replaces it: give the
                            global one when a batch is split over micro-batches or ranks. A
                            denominator of 0, number or tensor, counts as 1: nothing was counted
                            anywhere, so the loss is 0. A tensor below 0 makes the loss NaN.
    prompt_tokens           [S], of "prompt-mean": how many tokens count in all the responses to the
                            prompt of each sequence, also those in other micro-batches.
    sequence_group          process group whose ranks hold different tokens of the same sequences
                            (sequence or context parallelism): cu_seqlens, or the rows of a padded
                            batch, are this rank's parts of the same S sequences in the same order,
                            some perhaps empty; advantage [S] is whole. Lengths, log-ratio means,
                            token counts and stats are those of all ranks; loss is this rank's
                            share: the shares add up to the unsharded loss, and each rank's
                            gradients are that loss's.
    backend                 "auto", "triton" and "torch" are one pass of PyTorch, on every device;
                            "reference" is riskpo_kernels.reference.

    Returns (loss, stats): loss 0-d; stats detached 0-d tensors, made without waiting for the
    device. clip_low_fraction and clip_high_fraction: share of tokens (of non-empty sequences for
    the sequence ratio) whose gradient the bound cuts, for "cispo" whose weight; clip_fraction: the
    same with dual_clip's; ratio_mean, ratio_max over the same units; zero_coefficient_fraction:
    share of tokens whose slopes are all exactly 0; tokens: how many count; kl (with ref_logprob)
    and entropy (with entropy): means over tokens. Values that are NaN and have coefficient 0 are
    left out of the means and the maximum. Nothing to count gives zeros.

    Raises ValueError where shapes, dtypes, devices, words or numbers do not fit, or a constant
    requires grad.
    """
    sequences = check_layout(OP, logprob, cu_seqlens, mask)
    bounds = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    if loss_options is not None and not isinstance(loss_options, Mapping):
        reject(OP, f"loss_options={loss_options!r}", "a mapping of names to numbers", "")
    settings = {name: x for name, x in bounds.items() if x is not None} | dict(loss_options or {})
    total = denominator if isinstance(denominator, torch.Tensor) else None
    options = Options(
        loss=loss,
        settings=settings_of(OP, loss, ratio, {n: guarded(x) for n, x in settings.items()}),
        ratio=ratio,
        kl=kl,
        kl_coef=guarded(kl_coef),
        entropy_coef=guarded(entropy_coef),
        aggregate=aggregate,
        constant=guarded(constant),
        denominator=None if total is not None else guarded(denominator),
        advantage_per=advantage_per,
        correction_per=correction_per,
        off_policy_mask_threshold=guarded(off_policy_mask_threshold),
    )
    per_token = {"old_logprob": old_logprob, "ref_logprob": ref_logprob, "entropy": entropy}
    others = {"correction": correction, "prompt_tokens": prompt_tokens, "denominator": total}
    check_options(OP, options, total)
    check_tensors(OP, options, logprob, sequences, advantage, **others, **per_token)
    check_choice(OP, "backend", backend, BACKENDS)
    group = name_of(OP, "sequence_group", sequence_group)
    if backend == "reference":
        words = vars(options) | {"loss_options": settings, "denominator": denominator}
        where = {"cu_seqlens": cu_seqlens, "mask": mask, "sequence_group": sequence_group}
        others = {"correction": correction, "prompt_tokens": prompt_tokens, **per_token}
        return _by_reference(logprob, advantage, words, where, others)
    value, stats, tokens, *_ = surrogate_operator(
        logprob,
        entropy.detach() if entropy is not None and options.entropy_coef == 0 else entropy,
        old_logprob,
        advantage,
        correction,
        ref_logprob,
        mask,
        cu_seqlens,
        prompt_tokens,
        total,
        group,
        *(getattr(options, name) for name in WORDS),
    )
    absent = {"kl": ref_logprob is None, "entropy": entropy is None}
    named = dict(zip(STATS, stats.unbind(), strict=True)) | {"tokens": tokens}
    return SurrogateLoss(value, {n: x for n, x in named.items() if not absent.get(n, False)})


def _by_reference(
    logprob: torch.Tensor,
    advantage: torch.Tensor,
    words: dict[str, Any],
    where: dict[str, Any],
    others: dict[str, Any],
) -> SurrogateLoss:
    """With the shapes read as the operator reads them."""
    del words["settings"]
    cu_seqlens, group = where["cu_seqlens"], where["sequence_group"]
    if cu_seqlens is not None:
        check_bounds(OP, cu_seqlens, logprob.numel())
    if words["ratio"] == "sequence":
        words["advantage_per"] = "sequence"
    for name, x in (("advantage", advantage), ("correction", others["correction"])):
        if x is not None:
            word = words[f"{name}_per"]
            each = is_per_token(name, x, logprob, cu_seqlens, given=word, group=group)
            words[f"{name}_per"] = "token" if each else "sequence"
    with no_autocast(logprob.device):
        return reference.clipped_surrogate(logprob, advantage=advantage, **where, **others, **words)

"""clipped_surrogate: from per-token log-probs to the policy loss; sequence_logprob: their sums.

One pass makes the loss and its slopes with respect to logprob and entropy; backward multiplies
them by the upstream scalar. Memory beside the inputs: 8 bytes per token with an entropy bonus,
else 4 (Triton), or a few such buffers (torch).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from riskpo_kernels.backends import choose
from riskpo_kernels.checks import check_choice, reject
from riskpo_kernels.reference import surrogate as reference
from riskpo_kernels.reference.surrogate import (
    Sequences,
    SurrogateLoss,
    clip_bounds,
)
from riskpo_kernels.surrogate_checks import Options, check_layout, check_options, check_tensors
from riskpo_kernels.surrogate_torch import PassResult, Problem, Sums, torch_pass

OP = "clipped_surrogate"
CHUNK = 1024  # tokens per program where the sequences do not matter
STATS = (
    "clip_fraction",
    "clip_low_fraction",
    "clip_high_fraction",
    "ratio_mean",
    "ratio_max",
    "zero_coefficient_fraction",
    "kl",
    "entropy",
)


class _Surrogate(torch.autograd.Function):
    """logprob [N], entropy [N] or None -> loss, stats [8], tokens; only loss is differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        logprob: torch.Tensor,
        entropy: torch.Tensor | None,
        problem: Problem,
        denominator: torch.Tensor | float | None,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(logprob.dtype, torch.float32)
        one_pass = torch_pass if backend == "torch" else _triton_pass
        h = None if entropy is None else entropy.to(wide)
        slopes = one_pass(logprob.to(wide), h, problem)
        sums = slopes.sums
        share = reference.nonzero(sums.tokens if denominator is None else denominator)
        if not isinstance(share, torch.Tensor):
            share = torch.full((), share, dtype=wide, device=logprob.device)
        share = share.to(wide)
        wanted = zip(ctx.needs_input_grad, (slopes.dlogprob, slopes.dentropy), strict=False)
        ctx.save_for_backward(*(slope if need else None for need, slope in wanted), share)
        ctx.dtypes = logprob.dtype, None if entropy is None else entropy.dtype
        loss, stats, tokens = sums.loss.to(wide) / share, _stats(sums, wide), sums.tokens.long()
        ctx.mark_non_differentiable(stats, tokens)
        return loss, stats, tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        dlogprob, dentropy, share = ctx.saved_tensors
        scale = dloss / share
        wanted = zip(ctx.needs_input_grad, (dlogprob, dentropy), ctx.dtypes, strict=False)
        gradients = [(scale * slope).to(dtype) if need else None for need, slope, dtype in wanted]
        return *gradients, None, None, None


def _stats(sums: Sums, dtype: torch.dtype) -> torch.Tensor:
    units, tokens = sums.units.clamp(min=1), sums.tokens.clamp(min=1)
    per_unit = [x / units for x in (sums.cut, sums.low, sums.high, sums.ratio)]
    per_token = [x / tokens for x in (sums.zero, sums.kl, sums.entropy)]
    return torch.stack([x.to(dtype) for x in (*per_unit, sums.ratio_max, *per_token)])


def _triton_pass(logprob: torch.Tensor, entropy: torch.Tensor | None, p: Problem) -> PassResult:
    from riskpo_kernels.kernels.surrogate import surrogate_pass  # Triton may be missing

    o = p.options
    dlogprob, dentropy, columns = surrogate_pass(
        logprob,
        p.old,
        p.advantage,
        p.ref,
        entropy,
        p.mask,
        p.cu_seqlens,
        advantage_per_token=p.advantage_per_token,
        clip=p.clip,
        kl=o.kl,
        kl_coef=o.kl_coef,
        entropy_coef=o.entropy_coef,
        sequence_ratio=o.ratio == "sequence",
        sequence_mean=o.aggregate == "sequence-mean",
    )
    of_tokens, of_units, ratio_max = columns[:, :5], columns[:, 5:9], columns[:, 9]
    lengths = of_tokens[:, 1]
    if o.ratio == "sequence":  # a sequence is one unit, not as many as it has tokens
        units = (lengths > 0).sum()
        of_units = of_units.double() / lengths.clamp(min=1)[:, None]
    else:
        units = lengths.sum(dtype=torch.float64)
    tokens = of_tokens.sum(0, dtype=torch.float64).unbind()
    rest = of_units.sum(0, dtype=torch.float64).unbind()
    return PassResult(dlogprob, dentropy, Sums._make((*tokens, units, *rest, ratio_max.amax())))


def _weigh(
    advantage: torch.Tensor, correction: torch.Tensor, layout: Sequences, ratio: str
) -> tuple[torch.Tensor, bool]:
    """advantage times correction, [S] or flat [N], and whether it is per token.

    f is positively homogeneous in the advantage, so a weight of f is a weight of the advantage.
    """
    per_sequence = (layout.count,)
    if ratio == "sequence" and correction.shape != per_sequence:
        correction = layout.mean(layout.tokens(correction, advantage.dtype))
    if advantage.shape == correction.shape == per_sequence:
        return advantage * correction, False
    dtype = advantage.dtype
    return layout.spread(advantage, dtype) * layout.spread(correction, dtype), True


def _bounds(logprob: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """[S + 1] int64, bounds of the sequences in the flat tokens; chunks where there are none."""
    if cu_seqlens is not None:
        return cu_seqlens.long().contiguous()
    n = logprob.numel()
    step = logprob.shape[1] if logprob.dim() == 2 else CHUNK
    return torch.arange(0, n + step, step, device=logprob.device).clamp_(max=n)


def _problem(
    options: Options,
    sequences: int | None,
    logprob: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    correction: torch.Tensor | None,
    ref: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> Problem:
    """The callers' tensors as flat constants."""
    wide = torch.promote_types(logprob.dtype, torch.float32)
    weighted, per_token = advantage.detach().to(wide), advantage.shape != (sequences,)
    if correction is not None:
        layout = Sequences.of(logprob, cu_seqlens, mask)
        weighted, per_token = _weigh(weighted, correction.detach(), layout, options.ratio)
    return Problem(
        old=old.detach().reshape(-1),
        advantage=weighted.reshape(-1),
        advantage_per_token=per_token,
        ref=None if ref is None else ref.detach().reshape(-1),
        mask=None if mask is None else mask.reshape(-1) != 0,
        cu_seqlens=_bounds(logprob, cu_seqlens),
        clip=clip_bounds(options.ratio, options.clip_low, options.clip_high, options.dual_clip),
        options=options,
    )


def _run(
    p: Problem,
    logprob: torch.Tensor,
    entropy: torch.Tensor | None,
    sequences: int | None,
    backend: str,
) -> SurrogateLoss:
    o = p.options
    share = o.denominator
    if share is None and o.aggregate != "token-mean":  # that count comes from the pass
        assert sequences is not None  # check_tensors has seen to it
        norm = o.constant if o.aggregate == "sequence-sum-norm" else 1.0
        share = sequences * (norm or 1.0)
    h = None
    if entropy is not None:
        h = (entropy if o.entropy_coef else entropy.detach()).reshape(-1)
    loss, values, tokens = _Surrogate.apply(logprob.reshape(-1), h, p, share, backend)
    stats = dict(zip(STATS, values.unbind(), strict=True))
    absent = {"kl": p.ref is None, "entropy": entropy is None}
    stats = {name: x for name, x in stats.items() if not absent.get(name, False)}
    return SurrogateLoss(loss, stats | {"tokens": tokens})


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
    backend: str = "auto",
) -> SurrogateLoss:
    """Clipped policy loss to minimise: surrogate + kl_coef * KL - entropy_coef * entropy.

    Differentiable in logprob and entropy; everything else is a constant. A masked token never
    counts and its values (NaN, inf) are never read into a result.

    logprob, old_logprob    [N] flat, or [B, T] padded with a mask; nats, any float dtype. Computed
                            in float32 (float64 for float64); gradients come in the input's dtype.
    advantage               [S] (padded: [B]) per sequence, read so where S == N; or per token for
                            ratio="token"; floating, without grad.
    cu_seqlens              int32 or int64 [S + 1] from 0 to N, non-decreasing; flat tokens only.
                            Its check is the only wait for the device.
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
    correction              [S] or per token, not negative: sampler-mismatch weight, detached, of
                            the surrogate alone. Per token under the sequence ratio its mean acts.
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
                            denominator of 0 counts as 1.
    backend                 see riskpo_kernels.backends.

    Returns (loss, stats): loss 0-d; stats detached 0-d tensors, made without waiting for the
    device. clip_low_fraction and clip_high_fraction: share of tokens (of non-empty sequences for
    the sequence ratio) whose gradient the bound cuts; clip_fraction: the same with dual_clip's;
    ratio_mean, ratio_max over the same units; zero_coefficient_fraction: share of tokens whose
    slopes are all exactly 0; tokens: how many count; kl (with ref_logprob) and entropy (with
    entropy): means over tokens. Nothing to count gives zeros.

    Raises ValueError where shapes, dtypes, devices, words or numbers do not fit.
    """
    sequences = check_layout(OP, logprob, cu_seqlens, mask)
    options = Options(
        ratio=ratio,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        kl=kl,
        entropy_coef=entropy_coef,
        aggregate=aggregate,
        constant=constant,
        denominator=denominator,
    )
    per_token = {"old_logprob": old_logprob, "ref_logprob": ref_logprob, "entropy": entropy}
    check_options(OP, options)
    check_tensors(OP, options, logprob, sequences, advantage, correction, **per_token)
    chosen = choose(OP, backend, logprob.device, logprob.dtype)
    if chosen == "reference" or logprob.numel() == 0:
        return reference.clipped_surrogate(
            logprob,
            old_logprob,
            advantage,
            cu_seqlens=cu_seqlens,
            mask=mask,
            correction=correction,
            ref_logprob=ref_logprob,
            entropy=entropy,
            **vars(options),
        )
    problem = _problem(
        options,
        sequences,
        logprob,
        old_logprob,
        advantage,
        correction,
        ref_logprob,
        cu_seqlens,
        mask,
    )
    return _run(problem, logprob, entropy, sequences, chosen)

"""The operator behind clipped_surrogate: one pass makes the loss and its slopes.

Backward multiplies the slopes with respect to logprob and entropy by the upstream scalar. They are
results of the operator, beside the loss, the stats and the denominator.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from riskpo_kernels.core.backends import choose
from riskpo_kernels.core.matmul import no_autocast
from riskpo_kernels.core.operators import register
from riskpo_kernels.core.process_groups import agree, group_called, max_over, sum_over
from riskpo_kernels.policy_loss.checks import Options, check_bounds
from riskpo_kernels.policy_loss.torch_pass import PassResult, Problem, Sums, torch_pass
from riskpo_kernels.reference import surrogate as reference
from riskpo_kernels.reference.surrogate import Sequences, clip_bounds

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
TENSORS = (
    "Tensor logprob, Tensor? entropy, Tensor old, Tensor advantage, Tensor? correction, "
    "Tensor? ref, Tensor? mask, Tensor? cu_seqlens, Tensor? denominator"
)
# from ratio on the fields of surrogate_checks.Options, in their order
OPTIONS = (
    "str group, str backend, str ratio, float? clip_low, float? clip_high, float? dual_clip, "
    "float kl_coef, str kl, float entropy_coef, str aggregate, float? constant, "
    "str? advantage_per, str? correction_per, float? number"
)


def _wide(logprob: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logprob.dtype, torch.float32)


def _forward(
    logprob: torch.Tensor,
    entropy: torch.Tensor | None,
    old: torch.Tensor,
    advantage: torch.Tensor,
    correction: torch.Tensor | None,
    ref: torch.Tensor | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    denominator: torch.Tensor | None,
    group: str,
    backend: str,
    *numbers: Any,
) -> tuple[torch.Tensor, ...]:
    """loss, stats [8], tokens | slopes of the loss times its denominator, and that"""
    o, wide = Options(*numbers), _wide(logprob)
    o = o if denominator is None else replace(o, denominator=denominator)
    obstacle = "sequence_group is given, and a kernel reads whole sequences" if group else None
    chosen = choose(OP, backend, logprob.device, logprob.dtype, obstacle)
    if cu_seqlens is not None:
        check_bounds(OP, cu_seqlens, logprob.numel())
    with no_autocast(logprob.device):
        p = _problem(o, logprob, old, advantage, correction, ref, cu_seqlens, mask, group)
        h = None if entropy is None else entropy.reshape(-1).to(wide)
        one_pass = torch_pass if chosen == "torch" else _triton_pass
        dlogprob, dentropy, sums = one_pass(logprob.reshape(-1).to(wide), h, p)
        sums = sums if p.group is None else _over_ranks(sums, p.group)
        share = _denominator(p, sums, wide)
        loss, stats, tokens = sums.loss.to(wide) / share, _stats(sums, wide), sums.tokens.long()
    no_slope = logprob.new_empty(0, dtype=wide)
    slopes = (
        dlogprob.view(logprob.shape),
        no_slope if dentropy is None else dentropy.view(logprob.shape),
    )
    return loss, stats, tokens, *slopes, share


def _denominator(p: Problem, sums: Sums, wide: torch.dtype) -> torch.Tensor:
    o = p.options
    share = o.denominator
    if share is None:
        norm = o.constant if o.aggregate == "sequence-sum-norm" else 1.0
        share = sums.tokens if o.aggregate == "token-mean" else p.sequences * (norm or 1.0)
    share = reference.nonzero(share)
    if isinstance(share, torch.Tensor):
        return share.to(wide, copy=True)
    return torch.full((), share, dtype=wide, device=sums.loss.device)


def _over_ranks(sums: Sums, group: Any) -> Sums:
    """Stats of all ranks; the loss stays this rank's share."""
    loss, *others, ratio_max = sums
    totals = sum_over(group, torch.stack([x.double() for x in others]))
    return Sums._make((loss, *totals.unbind(), max_over(group, ratio_max.clone())))


def _stats(sums: Sums, dtype: torch.dtype) -> torch.Tensor:
    units, tokens = sums.units.clamp(min=1), sums.tokens.clamp(min=1)
    shares = [x / units for x in (sums.cut, sums.low, sums.high)]
    ratio, kl, entropy = (
        x / count.clamp(min=1)
        for x, count in (
            (sums.ratio, sums.ratio_units),
            (sums.kl, sums.kl_tokens),
            (sums.entropy, sums.entropy_tokens),
        )
    )
    values = (*shares, ratio, sums.ratio_max, sums.zero / tokens, kl, entropy)
    return torch.stack([x.to(dtype) for x in values])


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
    of_tokens, of_units, ratio_max = columns[:, :7], columns[:, 7:12], columns[:, 12]
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
    a: tuple[torch.Tensor, bool], w: tuple[torch.Tensor, bool], layout: Sequences
) -> tuple[torch.Tensor, bool]:
    """advantage times correction, [S] or flat [N], and whether it is per token; so are both given.

    f is positively homogeneous in the advantage, so a weight of f is a weight of the advantage.
    """
    if not a[1] and not w[1]:
        return reference.weighted(a[0], w[0]), False
    flat = (layout.spread(x, x.dtype, per_token=each) for x, each in (a, w))
    return reference.weighted(*flat), True


def _bounds(logprob: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """[S + 1] int64, bounds of the sequences in the flat tokens; chunks where there are none."""
    if cu_seqlens is not None:
        return cu_seqlens.long().contiguous()
    n = logprob.numel()
    step = logprob.shape[1] if logprob.dim() == 2 else CHUNK
    return torch.arange(0, n + step, step, device=logprob.device).clamp_(max=n)


def _problem(
    options: Options,
    logprob: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    correction: torch.Tensor | None,
    ref: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    group: str,
) -> Problem:
    """The callers' tensors, flat; clipped_surrogate has refused those that want a gradient."""
    wide = _wide(logprob)
    sequences = None if cu_seqlens is None else len(cu_seqlens) - 1
    sequences = logprob.shape[0] if logprob.dim() == 2 else sequences
    ranks = group_called(group)
    if ranks is not None:
        agree(OP, ranks, logprob.device, same={"sequences": 1 if sequences is None else sequences})
    where, weighted = (logprob, cu_seqlens), advantage.to(wide)
    per = "sequence" if options.ratio == "sequence" else options.advantage_per
    per_token = reference.is_per_token("advantage", advantage, *where, given=per, group=ranks)
    if correction is not None:
        layout, per = Sequences.of(logprob, cu_seqlens, mask, ranks), options.correction_per
        each = reference.is_per_token("correction", correction, *where, given=per, group=ranks)
        if options.ratio == "sequence" and each:
            correction, each = layout.mean(layout.tokens(correction, wide)), False
        weights = (weighted, per_token), (correction.to(wide), each)
        weighted, per_token = _weigh(*weights, layout)
    return Problem(
        old=old.reshape(-1),
        advantage=weighted.reshape(-1),
        advantage_per_token=per_token,
        ref=None if ref is None else ref.reshape(-1),
        mask=None if mask is None else mask.reshape(-1) != 0,
        cu_seqlens=_bounds(logprob, cu_seqlens),
        sequences=1 if sequences is None else sequences,
        group=ranks,
        clip=clip_bounds(options.ratio, options.clip_low, options.clip_high, options.dual_clip),
        options=options,
    )


def _forward_fake(
    logprob: torch.Tensor, entropy: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, ...]:
    wide = _wide(logprob)
    scalar = logprob.new_empty((), dtype=wide)
    slope = logprob.new_empty(logprob.shape, dtype=wide)
    return (
        scalar,
        logprob.new_empty(len(STATS), dtype=wide),
        logprob.new_empty((), dtype=torch.int64),
        slope,
        logprob.new_empty(0, dtype=wide) if entropy is None else torch.empty_like(slope),
        torch.empty_like(scalar),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, stats, tokens, *slopes, share = output
    wanted = zip(ctx.needs_input_grad, slopes, strict=False)
    ctx.save_for_backward(*(slope if need else None for need, slope in wanted), share)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:2]]
    ctx.mark_non_differentiable(stats, tokens, *slopes, share)


def _gradients(ctx: Any, dloss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    *slopes, share = ctx.saved_tensors
    scale, needs = dloss / share, ctx.needs_input_grad
    wanted = zip(needs, slopes, ctx.dtypes, strict=False)
    gradients = [(scale * slope).to(dtype) if need else None for need, slope, dtype in wanted]
    return *gradients, *(None,) * (len(needs) - 2)


surrogate_operator = register(
    OP,
    f"({TENSORS}, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_gradients,
)

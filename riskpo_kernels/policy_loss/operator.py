"""The operator behind clipped_surrogate: one pass makes the loss and its slopes.

loss = sum over counted tokens of weight (f + kl_coef KL - entropy_coef H) / denominator
d loss / d logprob = weight (df/dx + kl_coef dKL/dlogprob) / denominator

f and KL are the entries of formulas.py. The second line holds for both kinds of ratio: weight is
the same for all tokens of a sequence, and a token's share 1 / length in the mean x cancels against
the length terms that x enters. Backward multiplies the slopes by the upstream scalar. They are
results of the operator, beside the loss, the stats and the denominator.

One pass of PyTorch, on every device. docs/kernel-notes.md says why there is no Triton kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from riskpo_kernels.core.operators import register, schema_of
from riskpo_kernels.core.process_groups import group_called, max_over, sum_over
from riskpo_kernels.policy_loss.checks import Options, check_bounds
from riskpo_kernels.policy_loss.formulas import BOUND, KL, LOSSES, Term, held
from riskpo_kernels.policy_loss.sequences import OP, Sequences, is_per_token

STATS = (
    "clip_fraction",
    "clip_low_fraction",
    "clip_high_fraction",
    "ratio_mean",
    "zero_coefficient_fraction",
    "kl",
    "entropy",
    "ratio_max",
)


class Pass(NamedTuple):
    """The loss times its denominator, its slopes, and the sums that make the stats."""

    loss: torch.Tensor
    dlogprob: torch.Tensor  # [N]
    dentropy: torch.Tensor | None  # [N]
    sums: torch.Tensor  # [7, 2]: numerator and denominator of each of STATS but ratio_max
    ratio_max: torch.Tensor


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
    prompt_tokens: torch.Tensor | None,
    total: torch.Tensor | None,
    group: str,
    *options: Any,
) -> tuple[torch.Tensor, ...]:
    """loss, stats [8], tokens | slopes of the loss times its denominator, and that.

    total is the denominator where it is a tensor.
    """
    o, wide = Options(*options), _wide(logprob)
    if cu_seqlens is not None:
        check_bounds(OP, cu_seqlens, logprob.numel())
    s = Sequences.of(logprob, cu_seqlens, mask, group_called(group))
    a = _weighted(o, s, (logprob, cu_seqlens), advantage, correction)
    length = {"sequence-mean": s.lengths, "prompt-mean": prompt_tokens}.get(o.aggregate)
    new, old = s.tokens(logprob, wide), s.tokens(old, wide)
    ref, h = (None if x is None else s.tokens(x, wide) for x in (ref, entropy))
    p = one_pass(o, s, a, s.weight(wide, length), new, old, ref, h)
    share = _denominator(o, s, prompt_tokens, total, wide)
    loss, stats = p.loss / share, _stats(p, s.group)
    no_slope = logprob.new_empty(0, dtype=wide)
    dentropy = no_slope if p.dentropy is None else p.dentropy.view(logprob.shape)
    return loss, stats, s.lengths.sum(), p.dlogprob.view(logprob.shape), dentropy, share


def _weighted(
    o: Options,
    s: Sequences,
    where: tuple[torch.Tensor, torch.Tensor | None],
    advantage: torch.Tensor,
    correction: torch.Tensor | None,
) -> torch.Tensor:
    """Advantage times correction as flat [N], 0 where either is 0, whatever the other is.

    f is positively homogeneous in the advantage, so a weight of f is a weight of the advantage.
    """
    wide, per = _wide(where[0]), "sequence" if o.ratio == "sequence" else o.advantage_per
    each = is_per_token("advantage", advantage, *where, given=per, group=s.group)
    a = s.tokens(advantage, wide, per_token=each)
    if correction is None:
        return a
    each = is_per_token("correction", correction, *where, given=o.correction_per, group=s.group)
    w = s.tokens(correction, wide, per_token=each)
    w = s.spread(s.mean(w)) if each and o.ratio == "sequence" else w
    return torch.where((a == 0) | (w == 0), 0.0, a * w)


def one_pass(
    o: Options,
    s: Sequences,
    a: torch.Tensor,
    weight: torch.Tensor,
    new: torch.Tensor,
    old: torch.Tensor,
    ref: torch.Tensor | None,
    entropy: torch.Tensor | None,
) -> Pass:
    """Everything flat [N], in the dtype to compute in, 0 where a token does not count."""
    x = new - old
    if o.off_policy_mask_threshold is not None:  # DeepSeek-V3.2, arXiv 2512.02556
        far = s.spread(s.mean(-x)) > o.off_policy_mask_threshold
        a = torch.where(far & (a < 0), 0.0, a)
    f = _term(o, s, x, a, new)
    value, slope = (torch.where(a == 0, 0.0, y) for y in (f.value, f.slope))
    f = f._replace(value=a, slope=a)  # a name for what is needed again; the rest is freed here
    kl = None
    if ref is not None:
        u, inside = held(ref - new, BOUND["token"])
        kl, kl_slope = KL[o.kl](u, -inside, lambda: _ratio(x, "token"))
        if o.kl_coef != 0:
            value, slope = value + o.kl_coef * kl, slope + o.kl_coef * kl_slope
    dentropy = None
    if entropy is not None:
        dentropy = -o.entropy_coef * weight
        value = value - o.entropy_coef * entropy if o.entropy_coef != 0 else value
    # where, not only weight: a NaN that counts makes the whole sequence's slopes NaN
    dlogprob = torch.where(s.counted, weight * slope, 0.0)
    zero = dlogprob == 0 if dentropy is None else (dlogprob == 0) & (dentropy == 0)

    unit = s.weight(new.dtype, s.lengths if o.ratio == "sequence" else None)
    seen = s.counted & ((a != 0) | (f.r == f.r))
    cuts = [torch.zeros_like(zero) if cut is None else cut for cut in (f.low, f.high, f.beyond)]
    means = (
        _parts(cuts[0] | cuts[1] | cuts[2], unit),
        _parts(cuts[0], unit),
        _parts(cuts[1], unit),
        _parts(f.r, torch.where(seen, unit, 0.0)),
        _parts(zero, s.weight(new.dtype)),
        _parts(kl, s.weight(new.dtype), skip_nan=o.kl_coef == 0),
        _parts(entropy, s.weight(new.dtype), skip_nan=o.entropy_coef == 0),
    )
    r = torch.where(seen, f.r, 0.0)
    ratio_max = r.amax() if len(r) else r.sum()
    return Pass((weight * value).sum(), dlogprob, dentropy, torch.stack(means), ratio_max)


def _ratio(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """exp of x, held to the bound of that kind, and its slope."""
    y, inside = held(x, BOUND[kind])
    r = y.exp()
    return r, r * inside


def _term(o: Options, s: Sequences, x: torch.Tensor, a: torch.Tensor, new: torch.Tensor) -> Term:
    entry, sequence = LOSSES[o.loss], o.ratio == "sequence"
    settings = dict(zip(entry.settings(o.ratio), o.settings, strict=True))

    def ratio(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _ratio(s.spread(s.mean(x)) if sequence else x, o.ratio)

    return entry.term(x, a, new, ratio, **settings)


def _parts(x: torch.Tensor | None, weight: torch.Tensor, *, skip_nan: bool = False) -> torch.Tensor:
    """[2]: the weighted sum of x and the sum of the weights; `skip_nan`: of those that have an x,
    for nothing rests on it."""
    if x is None:
        return weight.new_zeros(2)
    weight = weight * (x == x) if skip_nan else weight
    return torch.stack((torch.where(weight > 0, weight * x, 0.0).sum(), weight.sum()))


def _stats(p: Pass, group: Any) -> torch.Tensor:
    """Stats of all ranks; the loss stays this rank's share."""
    sums, ratio_max = p.sums, p.ratio_max
    if group is not None:
        sums, ratio_max = sum_over(group, sums.double()), max_over(group, ratio_max.clone())
    means = sums[:, 0] / sums[:, 1].clamp(min=1)
    return torch.cat((means.to(ratio_max.dtype), ratio_max[None]))


def _denominator(
    o: Options,
    s: Sequences,
    prompt_tokens: torch.Tensor | None,
    given: torch.Tensor | None,
    wide: torch.dtype,
) -> torch.Tensor:
    """0-d. 0 counts as 1, for then nothing counts on any rank and the loss is 0; below 0 is NaN: a
    tensor's value cannot be refused without waiting for the device."""
    share: torch.Tensor | float | None = o.denominator if given is None else given
    if share is None:
        lengths = s.lengths.to(wide)
        if o.aggregate == "token-mean":
            share = lengths.sum()
        elif prompt_tokens is not None and o.aggregate == "prompt-mean":
            share = (lengths / prompt_tokens.to(wide).clamp(min=1)).sum()
        else:
            norm = o.constant if o.aggregate == "sequence-sum-norm" else None
            share = len(lengths) * (norm or 1.0)
    if not isinstance(share, torch.Tensor):
        share = torch.full((), share, dtype=wide, device=s.lengths.device)
    share = share.to(wide)
    return torch.where(share == 0, 1.0, torch.where(share > 0, share, float("nan")))


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
    schema_of(_forward, Options, 6),
    _forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_gradients,
)

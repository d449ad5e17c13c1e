"""clipped_surrogate and sequence_logprob as the papers write them; autograd does the gradients.

Nothing here is shared with what it checks. Each loss is the objective J of its paper with the sign
turned: r is the ratio of a token (PPO arXiv 1707.06347) or of a sequence (GSPO 2507.18071), x the
logarithm of the token's, a the advantage times the correction, lp the token's log-prob.

What has coefficient 0 is not read: a part of a term whose a, kl_coef or entropy_coef is 0 is 0 even
where its values are NaN, and so is a where advantage or correction is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from riskpo_kernels.reference.ranks import largest, summed


class SurrogateLoss(NamedTuple):
    """A scalar to minimise, and detached 0-d tensors on its device by name."""

    loss: torch.Tensor
    stats: dict[str, torch.Tensor]


CLIP = {"token": (0.2, 0.2), "sequence": (3e-4, 4e-4)}  # PPO; arXiv 2510.00911


class Policy(NamedTuple):
    """What an objective is made of, flat [N] in tokens; ratio(x) is that of a token or sequence."""

    x: torch.Tensor
    a: torch.Tensor
    lp: torch.Tensor
    ratio: Callable[[torch.Tensor], torch.Tensor]


class Objective(NamedTuple):
    """J [N], the ratio, and where a lower, an upper and a dual bound acts."""

    value: torch.Tensor
    r: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    dual: torch.Tensor


def ppo(p: Policy, clip_low: float, clip_high: float, dual_clip: float = float("inf")) -> Objective:
    """min(r A, clip(r, 1 - e_low, 1 + e_high) A); where A < 0 at least c A (arXiv 1912.09729)."""
    r = p.ratio(p.x)
    value = torch.min(r * p.a, torch.clamp(r, 1 - clip_low, 1 + clip_high) * p.a)
    loses, gains = p.a < 0, p.a > 0
    value = torch.where(loses & (value < dual_clip * p.a), dual_clip * p.a, value)
    low, high = loses & (r < 1 - clip_low), gains & (r > 1 + clip_high)
    return Objective(value, r, low, high, loses & (r > dual_clip))


def cispo(p: Policy, clip_low: float = 1.0, clip_high: float = 4.0) -> Objective:
    """sg(clip(r)) A log pi (MiniMax-M1, arXiv 2506.13585)."""
    r, counts = p.ratio(p.x), p.a != 0
    weight = torch.clamp(r, 1 - clip_low, 1 + clip_high).detach()
    low, high = counts & (r < 1 - clip_low), counts & (r > 1 + clip_high)
    return Objective(weight * p.a * p.lp, r, low, high, counts & False)


def icepop(p: Policy, clip_low: float = 0.5, clip_high: float = 4.0) -> Objective:
    """M(r) A, M(k) = k inside the band and 0 outside (Ring-1T, arXiv 2510.18855)."""
    r, counts = p.ratio(p.x), p.a != 0
    low, high = counts & (r < 1 - clip_low), counts & (r > 1 + clip_high)
    value = torch.where(low | high, torch.zeros_like(r), r * p.a)
    return Objective(value, r, low, high, counts & False)


def sapo(p: Policy, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Objective:
    """4 / tau * sigmoid(tau (r - 1)) A (arXiv 2511.20347)."""
    r, none = p.ratio(p.x), p.a != p.a
    up, down = (4 / tau / (1 + torch.exp(-tau * (r - 1))) for tau in (tau_pos, tau_neg))
    return Objective(torch.where(p.a > 0, up, down) * p.a, r, none, none, none)


def gmpo(p: Policy, clip_low: float = 0.4, clip_high: float = 0.4) -> Objective:
    """(product over t of min(r_t^s, clip(r_t, e^-low, e^high)^s)^s)^(1/T) A, s the sign of A (arXiv
    2507.20673), its product as a mean of logarithms."""
    sign = p.a.sign()
    log_min = torch.min(sign * p.x, sign * torch.clamp(p.x, -clip_low, clip_high))
    r = p.ratio(sign * log_min)
    low, high = (p.a < 0) & (p.x < -clip_low), (p.a > 0) & (p.x > clip_high)
    return Objective(r * p.a, r, low, high, (p.a != p.a) & False)


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "clip": ppo,
    "cispo": cispo,
    "icepop": icepop,
    "sapo": sapo,
    "gmpo": gmpo,
}


def divergence(kl: str, u: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Estimates of KL(pi, pi_ref) from u = log pi_ref - log pi; r is the token's ratio.

    k1, k2, k3: J. Schulman, "Approximating KL divergence". k3+: k3, with k2's gradient (verl).
    k3-unbiased: r k3 (DeepSeek-V3.2, arXiv 2512.02556). exp(u) - 1 - u in float64, for in float32
    nothing is left of it where policies are alike.
    """
    exact = u.double()
    k2, k3 = u.square() / 2, (torch.expm1(exact) - exact).to(u.dtype)
    straight_through = k2 - k2.detach() + k3.detach()
    return {"k1": -u, "k2": k2, "k3": k3, "k3+": straight_through, "k3-unbiased": r * k3}[kl]


class Layout(NamedTuple):
    """Flat [N] tokens of S sequences, over the ranks of a group where there is one."""

    segment: torch.Tensor  # [N]
    counted: torch.Tensor  # [N] bool
    length: torch.Tensor  # [S], counted tokens of each sequence
    group: Any

    @classmethod
    def of(
        cls, x: torch.Tensor, cu: torch.Tensor | None, mask: torch.Tensor | None, group: Any = None
    ) -> Layout:
        token = torch.arange(x.numel(), device=x.device)
        if cu is not None:
            segment, count = torch.bucketize(token, cu[1:].long(), right=True), len(cu) - 1
        else:
            segment, count = token // max(x.shape[-1], 1), x.shape[0] if x.dim() == 2 else 1
        counted = torch.ones_like(token) if mask is None else (mask.reshape(-1) != 0).long()
        length = counted.new_zeros(count).index_add(0, segment, counted)
        return cls(segment, counted.bool(), summed(length, group), group)

    def flat(self, x: torch.Tensor, dtype: torch.dtype, per: str | None = "token") -> torch.Tensor:
        """As [N], 0 where nothing counts. per: what x has one value for; None: its shape says."""
        per = per or ("sequence" if x.shape == self.length.shape else "token")
        each = x[self.segment] if per == "sequence" else x.reshape(-1)
        return torch.where(self.counted, each.to(dtype), 0.0)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """[N] to [S]."""
        return summed(x.new_zeros(len(self.length)).index_add(0, self.segment, x), self.group)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """[N] to the mean over each token's sequence, [N]."""
        return (self.sum(x) / self.length.clamp(min=1))[self.segment]

    def average(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """0-d, over all ranks, of what has weight."""
        total = summed(torch.where(weight > 0, weight * x, 0.0).sum(), self.group)
        return total / summed(weight.sum(), self.group).clamp(min=1)


def within(x: torch.Tensor, bound: float) -> torch.Tensor:
    """x clamped to +-bound."""
    return torch.where(x > bound, bound, torch.where(x < -bound, -bound, x))


def sequence_logprob(
    logprob: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reduce: str = "sum",
) -> torch.Tensor:
    """Token log-probs, flat [N] or padded [B, T], to [S]; at least float32."""
    s = Layout.of(logprob, cu_seqlens, mask)
    total = s.sum(s.flat(logprob, torch.promote_types(logprob.dtype, torch.float32)))
    return total / s.length.clamp(min=1) if reduce == "mean" else total


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
    backend: str = "reference",
) -> SurrogateLoss:
    """riskpo_kernels.clipped_surrogate says what the arguments mean; nothing is checked here, and
    an advantage or correction [S] is one per sequence where no word says otherwise."""
    wide = torch.promote_types(logprob.dtype, torch.float32)
    s = Layout.of(logprob, cu_seqlens, mask, sequence_group)
    sequence = ratio == "sequence"
    old, lp = s.flat(old_logprob.detach(), wide), s.flat(logprob, wide)
    a = s.flat(advantage, wide, "sequence" if sequence else advantage_per)
    if correction is not None:
        w = s.flat(correction.detach(), wide, correction_per)
        w = s.mean(w) if sequence else w  # of equal weights their own
        a = torch.where((a == 0) | (w == 0), 0.0, a * w)
    if off_policy_mask_threshold is not None:
        strayed = s.mean(old - lp.detach()) > off_policy_mask_threshold
        a = torch.where(strayed & (a < 0), 0.0, a)

    given = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    settings = {k: v for k, v in given.items() if v is not None} | dict(loss_options or {})
    if loss == "clip":
        settings = dict(zip(("clip_low", "clip_high"), CLIP[ratio], strict=True)) | settings

    def surrogate(lp: torch.Tensor) -> Objective:
        unread = a == 0  # away before autograd multiplies a NaN by 0
        x = torch.where(unread, 0.0, lp - old)
        policy = Policy(x, a, torch.where(unread, 0.0, lp), ratio_of)
        return OBJECTIVES[loss](policy, **settings)

    def ratio_of(x: torch.Tensor) -> torch.Tensor:
        return within(s.mean(x), 10.0).exp() if sequence else within(x, 20.0).exp()

    def penalty(lp: torch.Tensor) -> torch.Tensor:
        if ref_logprob is None:
            return torch.zeros_like(lp)
        u = within(s.flat(ref_logprob.detach(), wide) - lp, 20.0)
        return divergence(kl, u, within(lp - old, 20.0).exp())

    each = s.counted.to(wide)
    length = {"sequence-mean": s.length, "prompt-mean": prompt_tokens}.get(aggregate)
    weight = each if length is None else each / length.clamp(min=1)[s.segment]

    def total(lp: torch.Tensor) -> torch.Tensor:
        terms = -surrogate(lp).value
        return (weight * (terms + kl_coef * penalty(lp) if kl_coef else terms)).sum()

    value = total(lp)
    h = None if entropy is None else s.flat(entropy, wide)
    if h is not None and entropy_coef:
        value = value - entropy_coef * (weight * h).sum()
    if denominator is None:
        denominator = _denominator(aggregate, s, constant, prompt_tokens)
    with torch.enable_grad():
        leaf = lp.detach().requires_grad_()
        (slope,) = torch.autograd.grad(total(leaf), leaf)
    still = (slope == 0) & ((weight * entropy_coef == 0) | (h is None))

    unit = each / s.length.clamp(min=1)[s.segment] if sequence else each
    stats = _ratio_stats(surrogate(lp.detach()), a, ratio_of(lp.detach() - old), unit, s)
    stats["zero_coefficient_fraction"] = s.average(still, each)
    for name, x, coef in (("kl", penalty(lp.detach()), kl_coef), ("entropy", h, entropy_coef)):
        if x is not None and (name == "entropy" or ref_logprob is not None):
            x = x.detach()
            stats[name] = s.average(x, each if coef else each * ~x.isnan())
    return SurrogateLoss(value / positive(denominator), stats)


def positive(denominator: torch.Tensor | float) -> torch.Tensor | float:
    """0 as 1: where nothing counts on any rank, the loss is 0. Below 0 as NaN."""
    if isinstance(denominator, torch.Tensor):
        sound = torch.where(denominator > 0, denominator, float("nan"))
        return torch.where(denominator == 0, 1.0, sound)
    return denominator or 1.0


def _denominator(
    aggregate: str, s: Layout, constant: float | None, prompt_tokens: torch.Tensor | None
) -> torch.Tensor | float:
    if aggregate == "token-mean":
        return s.length.sum()
    if aggregate == "prompt-mean" and prompt_tokens is not None:
        return (s.length / prompt_tokens.clamp(min=1)).sum()
    norm = constant if aggregate == "sequence-sum-norm" else None
    return len(s.length) * (norm or 1.0)


def _ratio_stats(
    found: Objective, a: torch.Tensor, plain: torch.Tensor, unit: torch.Tensor, s: Layout
) -> dict[str, torch.Tensor]:
    """Shares of all units; the ratio's mean and maximum over those that have one or need one."""
    r = torch.where(a == 0, plain, found.r)
    seen = torch.where((a == 0) & r.isnan(), 0.0, unit)
    most = torch.where(seen > 0, r, 0.0)
    return {
        "clip_fraction": s.average(found.low | found.high | found.dual, unit),
        "clip_low_fraction": s.average(found.low, unit),
        "clip_high_fraction": s.average(found.high, unit),
        "ratio_mean": s.average(r, seen),
        "ratio_max": largest(most.amax() if len(r) else r.sum(), s.group),
        "tokens": s.length.sum(),
    }

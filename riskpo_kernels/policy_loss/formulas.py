"""The policy losses and KL estimates, one entry each: value, slope, source. All on this page.

x   log-ratio of a token, log pi - log pi_old
r   exp(x) of the token, or exp of the mean x of its sequence; dr, its slope: r or 0 (see `held`)
a   advantage, times the sampler correction
lp  log pi, the token's log-prob
u   log pi_ref - lp; du, its slope: -1 or 0

A loss is a function of (x, a, lp, ratio) and its settings by keyword; ratio(x) gives (r, dr). Its
value is what is minimised, its slope is d value / dx; where a is 0 both are replaced by 0. To add
one: the function and its line in LOSSES here, and a row in riskpo/algorithms.py.

NaN stays NaN: a log-prob that is NaN must be seen in the loss. (torch.clamp, torch.maximum and
torch.minimum keep it; a comparison is False.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

BOUND = {"token": 20.0, "sequence": 10.0}  # of |x|, and of a sequence's mean
AGGREGATES = ("sequence-mean", "token-mean", "prompt-mean", "sequence-sum", "sequence-sum-norm")
Ratio = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Term(NamedTuple):
    """One value per token. low, high, beyond: where the lower, upper and dual bound acts; None
    where the loss has no such bound."""

    value: torch.Tensor
    slope: torch.Tensor
    r: torch.Tensor
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    beyond: torch.Tensor | None = None


def held(x: torch.Tensor, bound: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x clamped to +-bound, and the slope of that: 1, or 0 beyond the bound."""
    return x.clamp(-bound, bound), (~(x.abs() > bound)).to(x.dtype)


def clip(
    x: torch.Tensor,
    a: torch.Tensor,
    lp: torch.Tensor,
    ratio: Ratio,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = float("inf"),
) -> Term:
    """-min(r a, clip(r, 1 - low, 1 + high) a), where a < 0 at most -dual a.

    PPO arXiv 1707.06347; two bounds: DAPO 2503.14476; dual clip: 1912.09729, INTELLECT-2's delta
    2505.07291; with the sequence ratio GSPO 2507.18071 and RiskPO 2510.00911.
    """
    r, dr = ratio(x)
    low, high = (a < 0) & (r < 1 - clip_low), (a > 0) & (r > 1 + clip_high)
    beyond = (a < 0) & (r > dual_clip)
    value = torch.maximum(-a * r, -a * r.clamp(1 - clip_low, 1 + clip_high))
    value = torch.where(beyond, -a * dual_clip, value)
    slope = torch.where(low | high | beyond, 0.0, -a * dr)
    return Term(value, slope, r, low, high, beyond)


def cispo(
    x: torch.Tensor,
    a: torch.Tensor,
    lp: torch.Tensor,
    ratio: Ratio,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> Term:
    """-sg(clip(r, 1 - low, 1 + high)) a lp: the weight is clipped, no token loses its gradient.

    MiniMax-M1, arXiv 2506.13585. By default no lower bound, as there, and weights up to
    5, as ScaleRL 2510.13786.
    """
    r, _ = ratio(x)
    low, high = (a != 0) & (r < 1 - clip_low), (a != 0) & (r > 1 + clip_high)
    slope = -a * r.clamp(1 - clip_low, 1 + clip_high)
    return Term(slope * lp, slope, r, low, high)


def icepop(
    x: torch.Tensor,
    a: torch.Tensor,
    lp: torch.Tensor,
    ratio: Ratio,
    *,
    clip_low: float = 0.5,
    clip_high: float = 4.0,
) -> Term:
    """-r a, or 0 where r is outside [1 - low, 1 + high], on either side and for either sign of a.

    IcePop (Ring-1T), arXiv 2510.18855: band [0.5, 5]. GLM-5's two-sided mask, 2602.15763, has the
    same gradient.
    """
    r, dr = ratio(x)
    low, high = (a != 0) & (r < 1 - clip_low), (a != 0) & (r > 1 + clip_high)
    outside = low | high
    return Term(torch.where(outside, 0.0, -a * r), torch.where(outside, 0.0, -a * dr), r, low, high)


def sapo(
    x: torch.Tensor,
    a: torch.Tensor,
    lp: torch.Tensor,
    ratio: Ratio,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> Term:
    """-(4 / tau) sigmoid(tau (r - 1)) a with tau = tau_pos where a > 0, else tau_neg.

    SAPO, arXiv 2511.20347: a smooth gate instead of a clip; the slope is that of -r a at r = 1.
    """
    r, dr = ratio(x)
    tau = torch.where(a > 0, tau_pos, tau_neg).to(r.dtype)
    z = tau * (r - 1)
    gate = torch.sigmoid(z)
    return Term(-4 * a * gate / tau, -4 * a * gate * torch.sigmoid(-z) * dr, r)


def gmpo(
    x: torch.Tensor,
    a: torch.Tensor,
    lp: torch.Tensor,
    ratio: Ratio,
    *,
    clip_low: float = 0.4,
    clip_high: float = 0.4,
) -> Term:
    """-r a, where r is the geometric mean of ratios that are clipped one by one.

    GMPO, arXiv 2507.20673: where a > 0 each token's x is at most high, where a < 0 at least -low;
    the bounds are of the log-ratio.
    """
    low, high = (a < 0) & (x < -clip_low), (a > 0) & (x > clip_high)
    x = torch.where(low, -clip_low, torch.where(high, clip_high, x))
    r, dr = ratio(x)
    return Term(-a * r, torch.where(low | high, 0.0, -a * dr), r, low, high)


@dataclass(frozen=True)
class PolicyLoss:
    """An entry of LOSSES.

    term        the function
    ratios      the kinds of ratio it is defined for
    sequence    defaults that are others under the sequence ratio, which is a geometric mean
    """

    term: Callable[..., Term]
    ratios: tuple[str, ...] = ("token", "sequence")
    sequence: dict[str, float] = field(default_factory=dict)

    def settings(self, ratio: str) -> dict[str, float]:
        """The function's settings with their defaults."""
        defaults = dict(self.term.__kwdefaults__ or {})
        return defaults | self.sequence if ratio == "sequence" else defaults


LOSSES = {
    "clip": PolicyLoss(clip, sequence={"clip_low": 3e-4, "clip_high": 4e-4}),
    "cispo": PolicyLoss(cispo),
    "icepop": PolicyLoss(icepop),
    "sapo": PolicyLoss(sapo),
    "gmpo": PolicyLoss(gmpo, ratios=("sequence",)),
}


def k3_value(u: torch.Tensor) -> torch.Tensor:
    """exp(u) - 1 - u without cancellation: where policies are alike, the line as it stands leaves
    no digit. Inside |u| < 1 it is u^2 / 2 (1 + u / 3 (1 + u / 4 (...)))."""
    tail = one = torch.ones((), dtype=u.dtype, device=u.device)
    for n in range(18 if u.dtype == torch.float64 else 12, 2, -1):
        tail = torch.addcmul(one, u, tail, value=1 / n)
    return torch.where(u.abs() < 1, 0.5 * u * u * tail, torch.expm1(u) - u)


# A KL estimate is a function of (u, du, ratio), ratio() giving the token's (r, dr); it returns its
# value and d value / d lp. The first three: J. Schulman, "Approximating KL divergence",
# http://joschu.net/blog/kl-approx.html.
Estimate = tuple[torch.Tensor, torch.Tensor]
TokenRatio = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def k1(u: torch.Tensor, du: torch.Tensor, ratio: TokenRatio) -> Estimate:
    """-u. Unbiased, but its gradient is 0 in expectation over the policy's samples."""
    return -u, -du


def k2(u: torch.Tensor, du: torch.Tensor, ratio: TokenRatio) -> Estimate:
    """u^2 / 2. Its gradient is that of KL(policy, reference) in expectation."""
    return 0.5 * u * u, u * du


def k3(u: torch.Tensor, du: torch.Tensor, ratio: TokenRatio) -> Estimate:
    """exp(u) - 1 - u. Unbiased, never negative; its gradient is that of KL(reference, policy)."""
    return k3_value(u), torch.expm1(u) * du


def k3_plus(u: torch.Tensor, du: torch.Tensor, ratio: TokenRatio) -> Estimate:
    """The value of k3 with the gradient of k2: verl's straight-through "k3+"."""
    return k3_value(u), u * du


def k3_unbiased(u: torch.Tensor, du: torch.Tensor, ratio: TokenRatio) -> Estimate:
    """r k3 with the gradient through r too, which is -r u: off-policy tokens then give value and
    gradient of KL(policy, reference). DeepSeek-V3.2, arXiv 2512.02556."""
    (r, dr), value = ratio(), k3_value(u)
    return r * value, dr * value + r * torch.expm1(u) * du


KL = {"k1": k1, "k2": k2, "k3": k3, "k3+": k3_plus, "k3-unbiased": k3_unbiased}

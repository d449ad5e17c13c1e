"""Settings of RiskPOAdvantage: one frozen record, three named rows, and what may be combined."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from riskpo_kernels.core.checks import check_choice, check_positive, reject
from riskpo_kernels.core.risk_checks import check_risk

OP = "RiskPOAdvantage"


@dataclass(frozen=True)
class RiskPOSettings:
    """Defaults are the paper's (arXiv 2510.00911). Scores are sums of bundle_size rewards."""

    form: str = "paper"  # as in mvar_advantage: paper | official | seeking | mean
    alpha: float = 0.2  # levels of the lower and upper quantile
    beta: float = 0.8
    omega: float = 0.5  # extra weight of the tail, form paper
    w_mix: float = 1.5  # mixing weight, forms official and seeking
    eps: float = 0.0  # the official code's 1e-6 beside its divisors
    bundle_size: int = 5  # B, questions per bundle
    quantiles: str = "tracked"  # tracked | bundle | mix
    tracker_step: float = 0.1  # of the tracked quantiles, in score units
    credit: str = "uniform"  # uniform | score | std | sum-mean | conditional
    bundling: str = "random"  # random | matched: questions of like difficulty
    difficulty: str = "history"  # history | prior | cross-fit: where matched bundles know it from
    history_rate: float = 0.3  # of the exponential mean of a question's rewards
    baseline: str = "natural"  # natural | none | leave-one-out | batch
    scale: str = "none"  # none | bundle-std | batch-std
    std_floor: float = 0.5  # smallest divisor of scale="batch-std", in score units
    pairing: str = "permuted"  # permuted | index
    leftover: str = "error"  # error | drop
    seed: int = 0  # of the pairing

    @property
    def compares_responses(self) -> bool:
        """Whether a draw is only compared with the others of its bundle: one alone gets 0."""
        if self.form == "mean":
            return self.baseline in ("natural", "leave-one-out")
        return self.quantiles == "bundle" or self.baseline == "leave-one-out"


# What the released trainer executes: its tracked quantiles never reach the advantage.
_OFFICIAL = RiskPOSettings(
    form="official", eps=1e-6, quantiles="bundle", scale="bundle-std", pairing="index"
)
PRESETS = {
    "paper": RiskPOSettings(),
    "official-easy": dataclasses.replace(_OFFICIAL, beta=0.9, credit="std"),
    # Not the authors': the paper's objective over bundles of like questions, without the noise of
    # the pairing. docs/risk.md derives it.
    "matched": RiskPOSettings(credit="conditional", bundling="matched", baseline="leave-one-out"),
    "official-hard": dataclasses.replace(_OFFICIAL, credit="sum-mean", baseline="none"),
}
CHOICES = {
    "quantiles": ("tracked", "bundle", "mix"),
    "credit": ("uniform", "score", "std", "sum-mean", "conditional"),
    "bundling": ("random", "matched"),
    "difficulty": ("history", "prior", "cross-fit"),
    "baseline": ("natural", "none", "leave-one-out", "batch"),
    "scale": ("none", "bundle-std", "batch-std"),
    "pairing": ("permuted", "index"),
    "leftover": ("error", "drop"),
}


def settings_from(preset: str, overrides: dict[str, Any]) -> RiskPOSettings:
    """The preset's row with `overrides`; ValueError on a name, value or pair that cannot be."""
    check_choice(OP, "preset", preset, tuple(PRESETS))
    known = [field.name for field in dataclasses.fields(RiskPOSettings)]
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            todo = f"Did you mean {near[0]!r}?" if near else "Check the spelling."
            reject(OP, f"unknown setting {name!r}", f"one of {known}", todo)
    s = dataclasses.replace(PRESETS[preset], **overrides)
    check_risk(OP, form=s.form, alpha=s.alpha, beta=s.beta, omega=s.omega, w_mix=s.w_mix, eps=s.eps)
    for name, choices in CHOICES.items():
        check_choice(OP, name, getattr(s, name), choices)
    for name in ("tracker_step", "std_floor", "history_rate"):
        check_positive(OP, name, getattr(s, name))
    for name, least in (("bundle_size", 1), ("seed", None)):
        value = getattr(s, name)
        if type(value) is not int or (least is not None and value < least):
            bound = "" if least is None else f" of at least {least}"
            reject(OP, f"{name}={value!r}", f"an int{bound}", f"Set {name} accordingly.")
    _check_scale(s)
    _check_conditional(s)
    return s


def _check_conditional(s: RiskPOSettings) -> None:
    """What an average over pairings, or a bundle of half of the responses, cannot go with."""
    if s.history_rate > 1:
        todo = "1 keeps the last visit alone."
        reject(OP, f"history_rate={s.history_rate}", "a number above 0 and at most 1", todo)
    conditional = s.credit == "conditional"
    wrong = {
        "quantiles": conditional and s.quantiles != "tracked",  # a bundle's own vary by pairing
        "scale": conditional and s.scale == "bundle-std",
        "baseline": conditional and s.form == "mean" and s.baseline == "natural",
        "credit": s.bundling == "matched" and s.difficulty == "cross-fit" and not conditional,
    }
    for name, refused in wrong.items():
        if refused:
            reject(
                OP,
                f"{name}={getattr(s, name)!r} with credit={s.credit!r}, difficulty="
                f"{s.difficulty!r}",
                "conditional credit with tracked quantiles, no scale by bundle, a baseline other "
                "than the bundle's mean, and cross-fit with conditional credit only",
                f"Change {name}, or use the preset 'matched'.",
            )


def _check_scale(s: RiskPOSettings) -> None:
    """A bundle whose draws tie has std 0: dividing by it is safe only where the advantage is 0."""
    if s.scale != "bundle-std":
        return
    if s.form == "mean":
        vanishes = s.baseline in ("natural", "leave-one-out")
    else:
        own_quantiles = s.quantiles == "bundle" and s.baseline in ("natural", "none")
        vanishes = own_quantiles or s.baseline == "leave-one-out"
    if not vanishes:
        reject(
            OP,
            f"scale='bundle-std' with form={s.form!r}, quantiles={s.quantiles!r}, "
            f"baseline={s.baseline!r}",
            "an advantage that is zero where all draws of a bundle tie (there std is zero too)",
            "Use scale='batch-std' (it has a floor) or 'none', quantiles='bundle', or "
            "baseline='leave-one-out'.",
        )

"""The sampler is not quite the trainer: other kernels, other roundings, other log-probs.

With r = pi_trainer / pi_sampler of a drawn token, weighting a term by r makes the expectation over
the sampler's draws that over the trainer's. The weight is bounded, or it would be its own problem:

    TIS   min(r, cap)                truncated (F. Yao et al., "Your efficient RL framework secretly
                                     brings you off-policy RL training", 2025)
    MIS   r where r <= cap, else 0   masked (J. Liu et al., "When speed kills stability", 2025)

level="sequence" takes the product of r over the response's tokens and gives the response one
weight; level="token" gives each token its own (under a sequence ratio their mean acts).

A sampler may fail to give a log-prob (vLLM: NaN or None). Such a token is NaN in Rollouts.logprob.
Its r is unknown: its weight, or its response's for level="sequence", is 0; it is left out of every
mean here, and counted as sampler_missing.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from riskpo.types import Rollouts

log = logging.getLogger("riskpo")

LOG_LIMIT = 20.0  # of log r, as in the surrogate
# Nats per token. An engine that rounds otherwise in 16 bits is some .001 to .01 off; state that
# leaks between packed sequences, or dropout, was measured at .1 to .4.
SAMPLER_KL_LIMIT = 0.05
_WARNED: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass(frozen=True)
class Correction:
    """kind "none", "tis" or "mis"; level "token" or "sequence"; cap of r, above 0."""

    kind: str = "none"
    level: str = "token"
    cap: float = 2.0

    def weight(self, trainer: torch.Tensor, sampler: torch.Tensor) -> torch.Tensor:
        """Weights of one response from its tokens' log-probs [n]: [n], or [] for a sequence.

        0 where the sampler's is missing; a NaN of the trainer's stays one.
        """
        ratio = self.ratio(trainer, sampler)
        missing = sampler.isnan()
        missing = missing.any() if self.level == "sequence" else missing
        held = ratio.clamp(max=self.cap) if self.kind == "tis" else ratio * (ratio <= self.cap)
        return torch.where(missing, 0.0, held)

    def ratio(self, trainer: torch.Tensor, sampler: torch.Tensor) -> torch.Tensor:
        """r of each token, or of the response; NaN where the sampler's log-prob is missing."""
        gap = trainer - sampler
        gap = gap.sum() if self.level == "sequence" else gap
        return gap.clamp(-LOG_LIMIT, LOG_LIMIT).exp()


@dataclass
class MismatchSums:
    """Sums over the tokens, or responses, of a batch; those of several processes may be added."""

    tokens: float = 0.0
    k3: float = 0.0
    units: float = 0.0  # tokens, or responses for level="sequence"
    weight: float = 0.0
    square: float = 0.0
    beyond: float = 0.0  # units whose r is above the cap
    missing: float = 0.0  # tokens without a log-prob of the sampler
    largest: float = 0.0

    def add(self, other: MismatchSums) -> None:
        for name in ("tokens", "k3", "units", "weight", "square", "beyond", "missing"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest = max(self.largest, other.largest)

    def numbers(self, kind: str) -> dict[str, float]:
        """sampler_kl: KL(sampler || trainer) per token, the k3 estimate on the sampler's draws.

        sampler_ratio_max: the largest r. sampler_ess: (sum w)^2 / (n sum w^2), the share of the
        sample that its weights leave; sampler_truncated or sampler_masked: share of weights that
        the cap changed; sampler_missing: tokens whose log-prob the sampler did not give, which the
        other numbers leave out.
        """
        units = max(self.units, 1.0)
        found = {
            "sampler_kl": self.k3 / max(self.tokens, 1.0),
            "sampler_ratio_max": self.largest,
            "sampler_missing": self.missing,
        }
        if kind == "none":
            return found
        changed = {"tis": "sampler_truncated", "mis": "sampler_masked"}[kind]
        ess = self.weight**2 / (units * self.square) if self.square else 0.0
        return found | {"sampler_ess": ess, changed: self.beyond / units}


def mismatch_sums(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], correction: Correction
) -> MismatchSums:
    """Sums over responses, each given as (trainer's, sampler's) log-probs [n] of its tokens."""
    total = MismatchSums()
    for trainer, sampler in pairs:
        given = ~sampler.isnan()
        gap = (trainer - sampler).double()[given].clamp(-LOG_LIMIT, LOG_LIMIT)
        whole = given if correction.level == "token" else given.all()
        ratio = correction.ratio(trainer, sampler).double()[whole]
        weight = correction.weight(trainer, sampler).double()[whole]
        total.add(
            MismatchSums(
                tokens=float(len(gap)),
                k3=float((torch.expm1(gap) - gap).sum()),
                units=float(ratio.numel()),
                weight=float(weight.sum()),
                square=float(weight.square().sum()),
                beyond=float((ratio > correction.cap).sum()),
                missing=float((~given).sum()),
                largest=float(ratio.max()) if ratio.numel() else 0.0,
            )
        )
    return total


def warn_of_mismatch(model: Any, sampler_kl: float) -> None:
    """Say, once of a model, that the sampler's policy is another, and what is known to cause it."""
    if sampler_kl > SAMPLER_KL_LIMIT and model not in _WARNED:
        _WARNED.add(model)
        log.warning(
            "sampler_kl is %.3g nats per token; expected at most %g. The sampler and the trainer "
            "do not hold the same policy. Known causes: another dtype or temperature in the "
            "engine, weights that the engine has not received, tokens that were encoded again "
            "(chat template, a second BOS), state that leaks between packed sequences (compare "
            "with micro_batch_tokens=1, one sequence at a time), dropout in the engine, or many "
            "updates on one batch. This is said once; sampler_kl is logged at every step.",
            sampler_kl,
            SAMPLER_KL_LIMIT,
        )


def warn_of_missing(rollouts: Rollouts, correction: Correction) -> None:
    """One line where the sampler left out log-probs, with what that costs."""
    missing = sum(int(x.isnan().sum()) for x in rollouts.logprob)
    if missing:
        rows = sum(bool(x.isnan().any()) for x in rollouts.logprob)
        cost = {"token": "these tokens have weight 0", "sequence": "these responses have weight 0"}
        log.warning(
            "the sampler gave no log-prob for %d tokens in %d of %d responses: %s",
            missing,
            rows,
            len(rollouts),
            "only the sampler's metrics leave them out"
            if correction.kind == "none"
            else cost[correction.level],
        )

"""Importance weights for a sampler whose log-probs differ from the trainer's (other kernels, say).

Weighting a term by r = pi_trainer / pi_sampler of its token turns the expectation over the
sampler's draws into that over the trainer's policy. A cap on the weight bounds the variance:

    TIS   min(r, cap)                truncated (F. Yao et al., "Your efficient RL framework secretly
                                     brings you off-policy RL training", 2025)
    MIS   r where r <= cap, else 0   masked (J. Liu et al., "When speed kills stability", 2025)

level="token" gives each token its own weight; under a sequence ratio their mean acts.
level="sequence" gives a response one weight, from the product of r over its tokens.

A NaN in Rollouts.logprob says that the sampler gave no log-prob (vLLM: NaN or None). The weight of
such a token, or with level="sequence" of its response, is 0. Every mean here leaves the token out;
sampler_missing counts it.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch

from riskpo.config import SamplerConfig
from riskpo.trainer.totals import Totals
from riskpo.types import Rollouts

log = logging.getLogger("riskpo")

LOG_LIMIT = 20.0  # of log r, as in the surrogate
# Nats per token. Rounding in 16 bits gives .001 to .01; dropout, or state that leaks between packed
# sequences, gave .1 to .4.
SAMPLER_KL_LIMIT = 0.05
_WARNED: weakref.WeakSet[Any] = weakref.WeakSet()


def correction_weights(
    trainer: dict[int, torch.Tensor], rollouts: Rollouts, settings: SamplerConfig, totals: Totals
) -> dict[int, torch.Tensor]:
    """{row: a weight for each input token, 1 inside the prompt}; {} without a correction.

    trainer holds log-probs by row, with the prompt's. Adds the sums of `mismatch_numbers` to
    `totals`.
    """
    prompts = {row: rollouts.prompt_len[row] - 1 for row in trainer}
    pairs = {
        row: (x[prompts[row] :], rollouts.logprob[row].to(x.device)) for row, x in trainer.items()
    }
    counted = list(pairs.values())
    if counted and settings.level == "token":  # in one call
        trainer_s, sampler_s = zip(*counted, strict=True)
        counted = [(torch.cat(trainer_s), torch.cat(sampler_s))]
    for pair in counted:
        count_mismatch(totals, settings, *pair)
    if settings.correction == "none":
        return {}
    each = {row: correction_weight(settings, *x).expand_as(x[0]) for row, x in pairs.items()}
    pad = torch.nn.functional.pad
    return {row: pad(weight, (prompts[row], 0), value=1.0) for row, weight in each.items()}


def correction_weight(
    settings: SamplerConfig, trainer: torch.Tensor, sampler: torch.Tensor
) -> torch.Tensor:
    """Weights of one response from its tokens' log-probs [n]: [n], or [] for level="sequence".

    0 where the sampler's log-prob is missing; NaN where the trainer's is NaN.
    """
    r, missing = ratio(settings, trainer, sampler)
    held = r.clamp(max=settings.cap) if settings.correction == "tis" else r * (r <= settings.cap)
    return torch.where(missing, 0.0, held)


def ratio(
    settings: SamplerConfig, trainer: torch.Tensor, sampler: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(r, whether a log-prob of the sampler is missing), of each token or of the response."""
    gap, missing = trainer - sampler, sampler.isnan()
    if settings.level == "sequence":
        gap, missing = gap.sum(), missing.any()
    return gap.clamp(-LOG_LIMIT, LOG_LIMIT).exp(), missing


def count_mismatch(
    totals: Totals, settings: SamplerConfig, trainer: torch.Tensor, sampler: torch.Tensor
) -> None:
    """Add log-probs [n] to the sums of `mismatch_numbers`.

    They are those of one response or, with level="token", of several end to end.
    """
    gap = (trainer - sampler).double()[~sampler.isnan()].clamp(-LOG_LIMIT, LOG_LIMIT)
    r, missing = ratio(settings, trainer, sampler)
    r = r.double()[~missing]
    w = correction_weight(settings, trainer, sampler).double()[~missing]
    sums = {
        "gap_tokens": float(len(gap)),
        "missing": float(len(sampler) - len(gap)),
        "gap_k3": float((torch.expm1(gap) - gap).sum()),
        "weights": float(r.numel()),
        "weight": float(w.sum()),
        "weight_square": float(w.square().sum()),
        "beyond_cap": float((r > settings.cap).sum()),
    }
    totals.add(sums, {"sampler_ratio": float(r.max()) if r.numel() else 0.0})


def mismatch_numbers(totals: Totals, settings: SamplerConfig) -> dict[str, float]:
    """Numbers for the log:

    sampler_kl         KL(sampler || trainer) in nats per token, k3 estimate on the sampler's draws
    sampler_ratio_max  the largest r
    sampler_missing    tokens without a log-prob of the sampler
    sampler_ess        effective sample size as a share: (sum w)^2 / (n sum w^2)
    sampler_truncated or sampler_masked   share of the weights that the cap changed
    """
    found = {
        "sampler_kl": totals.mean("gap_k3", "gap_tokens"),
        "sampler_ratio_max": totals.largest["sampler_ratio"],
        "sampler_missing": totals.sums["missing"],
    }
    if settings.correction == "none":
        return found
    changed = {"tis": "sampler_truncated", "mis": "sampler_masked"}[settings.correction]
    n, square = max(totals.sums["weights"], 1.0), totals.sums["weight_square"]
    ess = totals.sums["weight"] ** 2 / (n * square) if square else 0.0
    return found | {"sampler_ess": ess, changed: totals.sums["beyond_cap"] / n}


def warn_of_mismatch(model: Any, sampler_kl: float) -> None:
    """Warn, once per model, if sampler_kl says that sampler and trainer hold different policies."""
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


def warn_of_missing(rollouts: Rollouts, settings: SamplerConfig) -> None:
    """Warn if the sampler left out log-probs, and say what that costs."""
    missing = int(torch.cat(rollouts.logprob).isnan().sum())
    if missing:
        rows = sum(bool(x.isnan().any()) for x in rollouts.logprob)
        cost = {"token": "these tokens have weight 0", "sequence": "these responses have weight 0"}
        cost["none"] = "only the sampler's metrics leave them out"
        kind = "none" if settings.correction == "none" else settings.level
        said = "the sampler gave no log-prob for %d tokens in %d of %d responses: %s"
        log.warning(said, missing, rows, len(rollouts), cost[kind])

"""The policy losses that verl finds under `riskpo` and five more names; ROWS lists them.

verl passes one micro-batch of one rank and, in config.global_batch_info, the size of the whole
mini-batch. FSDP and Megatron average gradients over the ranks, so each rank divides by its share,
total / dp_size: any split into micro-batches and ranks then sums to one loss. verl adds entropy and
KL terms itself (verl.workers.utils.losses.ppo_loss).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from verl.trainer.ppo.core_algos import register_policy_loss

from riskpo.integrations.common import check_per_token, known_weights, sequence_advantage
from riskpo_kernels import clipped_surrogate

OP = "riskpo in verl"
AGGREGATES = {
    "token-mean": "token-mean",
    "token-sum": "sequence-sum",
    "seq-mean-token-mean": "sequence-mean",
    "seq-mean-token-sum": "sequence-sum",
    "seq-mean-token-sum-norm": "sequence-sum-norm",
}
WIDE = 0.1  # a sequence ratio is a geometric mean: it hardly ever leaves 1 +- 0.1
CONTRACT = """old_log_prob, log_prob, advantages, response_mask, rollout_is_weights: [B, T] of a
micro-batch. Masked values are never read. A NaN weight (the sampler gave no log-prob) is taken as 0
and counted in actor/riskpo_sampler_missing. loss_agg_mode: all five of verl's.
Returns (loss 0-d, metrics). ValueError for an unknown mode, a missing global size and, under a
sequence ratio, advantages that differ within a sequence."""

Loss = Callable[..., tuple[torch.Tensor, dict[str, float]]]


def _registered(name: str, ratio: str, default_mode: str, loss: str, about: str) -> Loss:
    """The function that verl's registry has under `name`, as verl calls it."""

    def policy_loss(
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = default_mode,
        config: Any = None,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        mode, mask = loss_agg_mode, response_mask
        if mode not in AGGREGATES:
            known = list(AGGREGATES)
            raise ValueError(f"{OP}: got loss_agg_mode={mode!r}; expected one of {known}.")
        if name == "riskpo":
            _warn_wide(config)
        if ratio == "sequence":
            advantage = sequence_advantage(OP, advantages, mask)
        else:
            check_per_token(OP, "advantages", advantages, mask)
            advantage = torch.where(mask != 0, advantages, 0.0).detach()
        weights, missing = known_weights(OP, rollout_is_weights, mask)
        value, stats = clipped_surrogate(
            log_prob,
            old_log_prob.detach(),
            advantage,
            mask=mask,
            ratio=ratio,
            loss=loss,
            **_bounds(loss, config),
            correction=weights,
            aggregate=AGGREGATES[mode],
            constant=1.0 if mode == "seq-mean-token-sum-norm" else None,
            denominator=_share(mode, mask, config.global_batch_info),
        )
        moved = torch.where(mask != 0, (old_log_prob - log_prob).detach().clamp(-20, 20), 0.0)
        clipped = stats["clip_low_fraction"] + stats["clip_high_fraction"]
        metrics = {
            "actor/pg_clipfrac": clipped,
            "actor/pg_clipfrac_lower": stats["clip_fraction"] - clipped,
            "actor/ppo_kl": moved.sum() / (mask != 0).sum().clamp(min=1),
            "actor/riskpo_ratio_mean": stats["ratio_mean"],
            "actor/riskpo_sampler_missing": missing,
            "actor/riskpo_zero_coefficient_fraction": stats["zero_coefficient_fraction"],
        }
        values = torch.stack([value.float() for value in metrics.values()]).tolist()
        return value, dict(zip(metrics, values, strict=True))

    policy_loss.__name__, policy_loss.__doc__ = f"{name}_policy_loss", f"{about}\n\n{CONTRACT}"
    registered: Loss = register_policy_loss(name)(policy_loss)
    return registered


def _bounds(loss: str, config: Any) -> dict[str, Any]:
    """clipped_surrogate's settings of a loss, by verl's names."""
    if loss == "sapo":
        return {"loss_options": {"tau_pos": config.tau_pos, "tau_neg": config.tau_neg}}
    low, high = config.clip_ratio_low, config.clip_ratio_high
    low, high = (config.clip_ratio if x is None else x for x in (low, high))
    bounds = {"clip_low": low, "clip_high": high}
    return bounds | ({"dual_clip": config.get("clip_ratio_c", 3.0)} if loss == "clip" else {})


def _share(mode: str, mask: torch.Tensor, info: dict[str, Any]) -> float | torch.Tensor:
    """This rank's part of the mini-batch's denominator, as in verl's agg_loss."""
    ranks = info.get("dp_size") or 1
    if mode == "token-sum":
        return 1 / ranks
    name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    total = info.get(name)
    if total is None:
        if ranks > 1:
            raise ValueError(
                f"{OP}: got dp_size={ranks} without {name}; expected the size of the whole "
                "mini-batch in config.global_batch_info, which verl's ppo_loss puts there."
            )
        live = mask != 0
        total = live.sum() if mode == "token-mean" else live.any(-1).sum()
    if mode == "seq-mean-token-sum-norm":
        total = total * (info.get("loss_scale_factor") or mask.shape[-1])
    return total / ranks


def _warn_wide(config: Any) -> None:
    if min(config.clip_ratio_low or 0, config.clip_ratio_high or 0) > WIDE:
        warnings.warn(
            f"{OP}: clip_ratio_low={config.clip_ratio_low}, clip_ratio_high="
            f"{config.clip_ratio_high} suit token ratios; a sequence ratio will hardly ever reach "
            "them. Set actor.clip_ratio_low=3e-4 and actor.clip_ratio_high=4e-4.",
            stacklevel=3,
        )


ROWS = (  # name, ratio, verl's mode that it has by default, loss of riskpo_kernels, what it is
    ("riskpo", "sequence", "seq-mean-token-mean", "clip",
     "The paper's loss: one clipped ratio per sequence (arXiv 2510.00911 sec. 4). Bounds: "
     "config.clip_ratio_low, clip_ratio_high (the paper's implementation in this repository: 3e-4 "
     "and 4e-4; verl's default 0.2 draws a warning) and clip_ratio_c for negative advantages."),
    ("riskpo_token", "token", "token-mean", "clip",
     "Token ratios with the dual clip, as the released RiskPO code: equal to verl's `vanilla`."),
    ("riskpo_cispo", "token", "token-mean", "cispo",
     "CISPO (arXiv 2506.13585): the ratio is a weight held to verl's bounds; verl's `cispo`."),
    ("riskpo_sapo", "token", "seq-mean-token-mean", "sapo",
     "SAPO (arXiv 2511.20347) with config.tau_pos and tau_neg; verl's `sapo`, in any mode."),
    ("riskpo_gmpo", "sequence", "seq-mean-token-mean", "gmpo",
     "GMPO (arXiv 2507.20673): the geometric mean of clipped token ratios; verl's `geo_mean`, with "
     "verl's bounds of the log-ratio."),
    ("riskpo_icepop", "token", "token-mean", "icepop",
     "IcePop (arXiv 2510.18855), a two-sided mask: no gradient outside verl's bounds, whatever the "
     "sign of the advantage; the paper's are clip_ratio_low=0.5 and clip_ratio_high=4."),
)  # fmt: skip
LOSSES = {row[0]: _registered(*row) for row in ROWS}
riskpo_policy_loss, riskpo_token_policy_loss = LOSSES["riskpo"], LOSSES["riskpo_token"]

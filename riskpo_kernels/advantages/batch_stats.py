"""The numbers that RiskPOAdvantage reports of one step."""

from __future__ import annotations

import torch

from riskpo_kernels.advantages.presets import RiskPOSettings
from riskpo_kernels.risk import cvar, mvar, official_monitor

TIED_STD = 1e-9  # rounding in sums of rewards; a real spread of scores is far above it


def batch_stats(
    r: torch.Tensor,
    groups: dict[str, list[int]],
    scores: torch.Tensor,
    q: tuple[torch.Tensor, torch.Tensor],
    tracked: torch.Tensor,
    advantage: torch.Tensor,
    s: RiskPOSettings,
) -> dict[str, float]:
    """Numbers of one step; `scores` are the K * G draws' and rewards and advantages all N.

    q_alpha, q_beta                        quantiles in use, mean over bundles
    q_alpha_tracked, q_beta_tracked        those of the tracker before this step
    rvar_lower, mvar                       RVaR_{0:alpha} and MVaR of the scores
    monitor_rvar, _cvar, _mvar             `official_monitor` at the tracked quantiles
    reward_mean, bundle_score_mean, bundle_score_std
    tied_bundle_fraction                   bundles whose draws all have one score
    all_equal_question_fraction            questions whose rewards are all alike
    zero_advantage_fraction, advantage_mean, _min, _max
    bundles, and beside these dropped_questions and tracker_moved (1 or 0)
    history_known_fraction                 with difficulty="history": questions seen before
    with conditional credit also those of `conditional_advantage`
    """
    pooled = scores.flatten()
    by_question = r[torch.tensor(list(groups.values()), device="cpu")]
    monitor = official_monitor(pooled, tracked[0], tracked[1], w_mix=s.w_mix)
    values: dict[str, torch.Tensor | float] = {
        "q_alpha": q[0].mean(),
        "q_beta": q[1].mean(),
        "q_alpha_tracked": tracked[0],
        "q_beta_tracked": tracked[1],
        "rvar_lower": cvar(pooled, s.alpha),
        "mvar": mvar(pooled, s.alpha, s.beta, s.omega),
        "monitor_rvar": monitor.rvar,
        "monitor_cvar": monitor.cvar,
        "monitor_mvar": monitor.mvar,
        "reward_mean": r.mean(),
        "bundle_score_mean": pooled.mean(),
        "bundle_score_std": sample_std(pooled),
        "tied_bundle_fraction": (sample_std(scores) <= TIED_STD).double().mean(),
        "all_equal_question_fraction": _all_equal(by_question).double().mean(),
        "zero_advantage_fraction": (advantage == 0).double().mean(),
        "advantage_mean": advantage.mean(),
        "advantage_min": advantage.min(),
        "advantage_max": advantage.max(),
        "bundles": scores.shape[0],
    }
    return {name: float(value) for name, value in values.items()}


def _all_equal(x: torch.Tensor) -> torch.Tensor:
    return (x == x[..., :1]).all(-1)


def sample_std(x: torch.Tensor) -> torch.Tensor:
    """Sample std (n - 1) of the last dimension, 0 for a single value."""
    return x.std(-1) if x.shape[-1] > 1 else torch.zeros_like(x[..., 0])

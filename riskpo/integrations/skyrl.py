"""RiskPO in SkyRL: one call in your entry point registers an estimator and a policy loss.

    from riskpo.integrations import skyrl
    skyrl.register(state_dir="ckpts/riskpo", bundle_size=5)

Then set trainer.algorithm.advantage_estimator=riskpo and trainer.algorithm.policy_loss_type=riskpo.
Call it in the process that runs the trainer, inside the Ray entry-point task. SkyRL hands pickled
copies of registered functions to other processes, and a copy would track quantiles of its own.

Tested with skyrl 0.3.0 on the CPU (tests/integrations/test_skyrl_host.py): registries, estimator,
scaling of advantages, and the loss beside its own gspo. No run on Ray.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from riskpo.integrations.common import CountedAdvantage, sequence_advantage
from riskpo_kernels import clipped_surrogate

OP = "riskpo in SkyRL"
CORRECTIONS = (
    "tis_ratio_type", "sequence_mask_metric", "outlier_token_is_threshold_low",
    "outlier_token_is_threshold_high", "token_mask_is_threshold_low",
    "token_mask_is_threshold_high",
)  # fmt: skip


class Estimator:
    """SkyRL's advantage estimator; its state is written to state_dir/batch_N after batch N.

    resume_batch=N continues from that file. One batch is one training step, so N is the global step
    of the checkpoint. settings: preset, ragged, and the overrides of RiskPOAdvantage.
    """

    def __init__(
        self, state_dir: str | os.PathLike[str], resume_batch: int = 0, **settings: Any
    ) -> None:
        self._advantage = CountedAdvantage(OP, settings, names_stay=True)  # a uid is the row's
        self._folder, self._process = Path(state_dir), os.getpid()
        if resume_batch:
            self._advantage.load(self._folder / f"batch_{resume_batch}")

    def __call__(
        self,
        token_level_rewards: torch.Tensor,
        response_mask: torch.Tensor,
        index: Sequence[Any],
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(advantages, returns) [B, T] from rewards and mask [B, T] and uids [B].

        Row order does not matter. ValueError as RiskPOAdvantage raises; RuntimeError in another
        process than the one that registered.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{OP}: called in process {os.getpid()}, registered in {self._process}; expected "
                "one process. Call register() inside the task that runs the trainer."
            )
        uids = [str(uid) for uid in index]
        spread, stats = self._advantage.over_tokens(token_level_rewards, response_mask, uids)
        self._advantage.save(self._folder / f"batch_{self._advantage.batches}", stats=stats)
        return spread, spread.clone()


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    config: Any,
    loss_mask: torch.Tensor | None = None,
    rollout_logprobs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The clipped surrogate of sequence ratios, summed over the counted tokens; tensors [B, T].

    SkyRL's trainer scales advantages beforehand, so that sums over micro-batches give the mean that
    config.loss_reduction names; the paper's is sequence_mean. Bounds: config.eps_clip_low and
    eps_clip_high (3e-4 and 4e-4). ValueError for off-policy correction and
    advantage_batch_normalize, which are not applied here, and if a sequence's advantages differ.
    """
    correction = getattr(config, "off_policy_correction", None)
    for name in CORRECTIONS:
        if getattr(correction, name, None) is not None:
            raise ValueError(f"{OP}: got off_policy_correction.{name}; expected it to be None.")
    if getattr(config, "advantage_batch_normalize", False):
        raise ValueError(
            f"{OP}: got advantage_batch_normalize; expected False, since RiskPO scales advantages "
            "itself. Unset it."
        )
    mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
    loss, stats = clipped_surrogate(
        log_probs,
        old_log_probs.detach(),
        sequence_advantage(OP, advantages, mask),
        mask=mask,
        ratio="sequence",
        clip_low=config.eps_clip_low,
        clip_high=config.eps_clip_high,
        aggregate="sequence-sum",
        denominator=1.0,
    )
    return loss, {"clip_ratio": float(stats["clip_fraction"])}


def register(
    state_dir: str | os.PathLike[str], resume_batch: int = 0, **settings: Any
) -> Estimator:
    """Register an Estimator with these arguments, and the loss, as "riskpo"; once per process."""
    from skyrl.backends.skyrl_train.utils.ppo_utils import (
        AdvantageEstimatorRegistry,
        PolicyLossRegistry,
    )

    estimator = Estimator(state_dir, resume_batch, **settings)
    AdvantageEstimatorRegistry.register("riskpo", estimator)
    PolicyLossRegistry.register("riskpo", policy_loss)
    print(f"{OP}: estimator and loss riskpo registered, state in {state_dir}", flush=True)
    return estimator

"""RiskPO in slime: a reward hook on the rollout manager, which sees all samples of a rollout.

    --custom-reward-post-process-path riskpo.integrations.slime.post_process
    --advantage-estimator gspo

The hook's contract, hook(args, samples) -> (raw_rewards, rewards), and the fields of Sample were
checked against the source: slime/ray/rollout.py at THUDM/slime 00de6b0 and slime/utils/types.py at
7985bf2. slime itself was not run. For other settings make a hook of your own in a module of yours:

    post_process = RewardHook(bundle_size=4, baseline="leave-one-out")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from riskpo.integrations.common import CountedAdvantage

OP = "riskpo in slime"
ESTIMATORS = ("grpo", "gspo", "cispo")  # they take a sample's reward as its advantage


class RewardHook:
    """Turns the rewards of a rollout into RiskPO's advantages; the tracker moves once per call.

    settings: preset, ragged, and the overrides of RiskPOAdvantage. sample.group_index names the
    question and sample.index its answer, so order does not matter. The state is written to
    SAVE/riskpo/rollout_N/riskpo_state.json after rollout N (args.save). When slime resumes
    (args.start_rollout_id, or Megatron's latest_checkpointed_iteration.txt), it is read from
    args.load.

    ValueError for samples without reward, index or group_index, for --normalize-advantages, for an
    estimator that discounts rewards, and as RiskPOAdvantage raises.
    """

    def __init__(self, **settings: Any) -> None:
        # group_index counts on from rollout to rollout
        self._advantage = CountedAdvantage(OP, settings, names_stay=False)
        self._started = False

    def __call__(self, args: Any, samples: list[Any]) -> tuple[list[float], list[float]]:
        """(raw rewards, advantages), one per sample in the order given."""
        if samples and isinstance(samples[0], list):
            samples = sum(samples, [])
        if not self._started:
            self._start(args)
        raw = [sample.get_reward_value(args) for sample in samples]
        for sample, reward in zip(samples, raw, strict=True):
            if None in (reward, sample.group_index, sample.index):
                raise ValueError(
                    f"{OP}: got a sample with reward {reward}, group_index {sample.group_index}, "
                    f"index {sample.index}; expected all three. Give failed samples reward 0."
                )
        advantages, stats = self._advantage(
            torch.tensor(raw, dtype=torch.float64),
            [int(sample.group_index) for sample in samples],
            [int(sample.index) for sample in samples],
        )
        if args.save:
            self._advantage.save(_folder(args.save, self._advantage.batches - 1), stats=stats)
        return raw, advantages.tolist()

    def _start(self, args: Any) -> None:
        normalised = getattr(args, "normalize_advantages", False)
        if args.advantage_estimator not in ESTIMATORS or normalised:
            raise ValueError(
                f"{OP}: got advantage_estimator={args.advantage_estimator!r}, normalize_advantages="
                f"{normalised}; expected one of {ESTIMATORS} without normalisation, which would "
                "rescale RiskPO's advantages."
            )
        first = first_rollout(args)
        if first > 0:
            self._advantage.load(_folder(args.load, first - 1))
        self._started = True


def first_rollout(args: Any) -> int:
    """The rollout that slime starts with: the given one, or that after Megatron's last."""
    if getattr(args, "start_rollout_id", None) is not None:
        return int(args.start_rollout_id)
    if not getattr(args, "load", None):
        return 0
    tracker = Path(args.load) / "latest_checkpointed_iteration.txt"
    text = tracker.read_text().strip() if tracker.is_file() else ""
    return int(text) + 1 if text.isdigit() else 0


def _folder(root: str, rollout: int) -> Path:
    return Path(root) / "riskpo" / f"rollout_{rollout}"


post_process = RewardHook()

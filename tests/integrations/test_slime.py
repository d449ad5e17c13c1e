"""The slime hook, called as slime's RolloutManager calls it, on samples with slime's fields."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from riskpo.integrations.slime import RewardHook
from riskpo_kernels import reference

SETTINGS = {"bundle_size": 2, "seed": 5}


@dataclass
class Sample:
    group_index: int | None
    index: int | None
    reward: float | None

    def get_reward_value(self, args):
        return self.reward if not args.reward_key else self.reward[args.reward_key]


def arguments(folder, **changes):
    made = {
        "reward_key": None,
        "advantage_estimator": "gspo",
        "normalize_advantages": False,
        "save": str(folder),
        "load": str(folder),
        "start_rollout_id": None,
    }
    return SimpleNamespace(**made | changes)


def rollout(seed: int):
    draw = random.Random(seed)
    made = [Sample(g, 4 * g + j, float(draw.random() < 0.5)) for g in range(4) for j in range(4)]
    draw.shuffle(made)
    return made


def test_rewards_become_the_references_advantages(tmp_path):
    samples = rollout(0)
    raw, advantages = RewardHook(**SETTINGS)(arguments(tmp_path), samples)
    expected, _ = reference.RiskPOAdvantage("paper", **SETTINGS)(
        torch.tensor(raw),
        [s.group_index for s in samples],
        step=0,
        draw=[s.index for s in samples],
    )
    assert raw == [s.reward for s in samples]
    assert advantages == pytest.approx(expected.tolist()) and any(advantages)


def test_neither_order_nor_nesting_of_samples_matters(tmp_path):
    samples = rollout(1)
    _, advantages = RewardHook(**SETTINGS)(arguments(tmp_path), samples)
    by_index = {s.index: a for s, a in zip(samples, advantages, strict=True)}
    ordered = sorted(samples, key=lambda s: s.index)
    groups = [ordered[i : i + 4] for i in range(0, 16, 4)]
    _, again = RewardHook(**SETTINGS)(arguments(tmp_path), groups)
    assert again == [by_index[s.index] for s in ordered]


def test_a_resumed_run_continues_the_uninterrupted_one(tmp_path):
    args, hook = arguments(tmp_path), RewardHook(**SETTINGS)
    straight = [hook(args, rollout(seed)) for seed in range(4)]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    resumed = RewardHook(**SETTINGS)
    assert [resumed(args, rollout(seed)) for seed in (2, 3)] == straight[2:]
    named = RewardHook(**SETTINGS)
    assert named(arguments(tmp_path, start_rollout_id=3), rollout(3)) == straight[3]
    with pytest.raises(ValueError, match="without riskpo_state.json"):
        RewardHook(**SETTINGS)(arguments(tmp_path, start_rollout_id=9), rollout(0))
    with pytest.raises(ValueError, match="settings of the saved run"):
        RewardHook(**SETTINGS | {"omega": 1.0})(args, rollout(0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"normalize_advantages": True}, "normalize_advantages=True"),
        ({"advantage_estimator": "reinforce_plus_plus"}, "expected one of"),
    ],
)
def test_what_would_rescale_the_advantages_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        RewardHook(**SETTINGS)(arguments(tmp_path, **change), rollout(0))


def test_samples_without_reward_or_question_are_named(tmp_path):
    samples = [*rollout(0)[1:], Sample(0, 0, None)]
    with pytest.raises(ValueError, match="reward None"):
        RewardHook(**SETTINGS)(arguments(tmp_path), samples)


def test_sources_of_difficulty_that_the_host_cannot_give_are_refused_at_once():
    with pytest.raises(ValueError, match="difficulty='prior'; expected 'history' or 'cross-fit'"):
        RewardHook(preset="matched", difficulty="prior")
    with pytest.raises(ValueError, match="'history' with matched bundles; expected 'cross-fit'"):
        RewardHook(preset="matched")
    RewardHook(preset="matched", difficulty="cross-fit")

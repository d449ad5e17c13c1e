"""Advantages over the responses to one question: golden numbers, by hand and by enumeration."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from riskpo.group_advantages import (
    CurveAdvantage,
    GroupAdvantage,
    difficulty_weighted,
    minus_mean,
    minus_others,
    over_mean,
    over_std,
    risk_seeking,
)


def test_grpo_golden():
    """Algorithm notes G9: rewards 1, 0, 0, 1, 0."""
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 0, 0])
    ids = ["a"] * 5 + ["b"] * 5
    grpo, _ = GroupAdvantage(over_std)(rewards, ids, step=1)
    up, down = 1.095443, -0.730295
    torch.testing.assert_close(
        grpo, torch.tensor([up, down, down, up, down] + [0.0] * 5), rtol=0, atol=5e-6
    )
    dr_grpo, stats = GroupAdvantage(minus_mean)(rewards, ids, step=1)
    torch.testing.assert_close(dr_grpo, torch.tensor([0.6, -0.4, -0.4, 0.6, -0.4] + [0.0] * 5))
    assert stats["zero_advantage_fraction"] == 0.5


def test_rivals_golden():
    """Rewards 1, 0, 0, 1, 0: RLOO, MaxRL and RS-GRPO by hand, and 0 for a question never right."""
    rewards = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    ids = ["a"] * 5 + ["b"] * 5
    mean = (2 * math.e**2 + 3) / 5
    golden = {
        minus_others: (0.75, -0.5),
        over_mean: (1.5, -1.0),
        difficulty_weighted: (0.75 * (1 - 0.6 / 4), -0.5 * (1 - 0.6 / 2)),
        risk_seeking: ((math.e**2 / mean - 1) / 2, (1 / mean - 1) / 2),
    }
    for formula, (up, down) in golden.items():
        found, stats = GroupAdvantage(formula)(rewards, ids, step=1)
        want = torch.tensor([up, down, down, up, down] + [0.0] * 5, dtype=torch.float64)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=0)
        assert stats["zero_advantage_fraction"] == 0.5


def by_four(*right):
    """Rewards of questions with four responses, of which so many are right, and their names."""
    rewards = [1.0 if i < n else 0.0 for n in right for i in range(4)]
    return torch.tensor(rewards), [f"q{i // 4}" for i in range(len(rewards))]


def test_curverl_by_hand():
    """Bins of G = 4: the means .25, .5, .75 are one each; those of 0 and 1 are none."""
    first = CurveAdvantage()
    found, _ = first(*by_four(0, 1, 3, 4), step=1)  # no earlier step: this one's f / F
    quarter, three = torch.tensor([0.75, -0.25, -0.25, -0.25]), torch.tensor([0.25] * 3 + [-0.75])
    zero = torch.zeros(4)
    torch.testing.assert_close(found, torch.cat([zero, quarter, 0.5 * three, zero]))
    assert first.state_dict() == {"window": [[0.25, 0.75]]}
    found, stats = first(*by_four(1, 1, 2, 3), step=2)  # f / F of step 1: 1, 1, 0, 1/2
    torch.testing.assert_close(found, torch.cat([quarter, quarter, zero, 0.5 * three]))
    assert stats["zero_advantage_fraction"] == 0.25
    resumed = CurveAdvantage()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for each in (first, resumed):  # of steps 1 and 2: .25 three times, .5 once, .75 twice
        found, _ = each(*by_four(1, 2, 3), step=3)
        half = torch.tensor([0.5, 0.5, -0.5, -0.5])
        torch.testing.assert_close(found, torch.cat([quarter, half / 4, three / 3]))
    for step in range(4, 20):
        first(*by_four(2), step=step)
    assert first.state_dict() == {"window": [[0.5]] * 10}
    with pytest.raises(ValueError, match="rewards from -1.0 to 1.0; expected them in"):
        first(2 * by_four(1)[0] - 1, ["q"] * 4, step=20)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_difficulty_weighted_is_rloo_times_its_weight(p):
    """By enumeration of four responses: the expected gradient of p is RLOO's times 1 - .6 p."""
    gradient = {minus_others: 0.0, difficulty_weighted: 0.0}
    for outcome in itertools.product((0.0, 1.0), repeat=4):
        r = torch.tensor([outcome], dtype=torch.float64)
        chance = (p * r + (1 - p) * (1 - r)).prod()
        score = (r - p) / (p * (1 - p))
        for formula in gradient:
            gradient[formula] += float(chance * (formula(r) * score).sum())
    assert gradient[difficulty_weighted] / gradient[minus_others] == pytest.approx(
        1 - 0.6 * p, rel=1e-12
    )


@pytest.mark.parametrize(
    "formula", [over_std, minus_mean, minus_others, difficulty_weighted, over_mean, risk_seeking]
)
def test_equal_rewards_give_exactly_0(formula):
    """0.1 + ... + 0.1 over 5 is not 0.1 in float32, and its std is divided by."""
    for reward in (0.1, -0.7, 1e4 / 3):
        for responses in (3, 5, 7, 10):
            rewards = torch.full((responses,), reward)
            advantage, stats = GroupAdvantage(formula)(rewards, ["a"] * responses, step=1)
            assert not advantage.any() and stats["zero_advantage_fraction"] == 1.0
    if formula in (over_mean, difficulty_weighted):
        return  # a mean of rewards is no difference
    offset = torch.tensor([1e6, 1e6 + 1, 1e6, 1e6 + 1])
    advantage, _ = GroupAdvantage(formula)(offset, ["a"] * 4, step=1)
    near, _ = GroupAdvantage(formula)(offset - 1e6, ["a"] * 4, step=1)
    assert torch.equal(advantage, near)

"""The table of algorithms: golden numbers of the baselines, and one step's batch of rollouts."""

from __future__ import annotations

import pytest
import torch

from riskpo.algorithms import (
    STRATEGIES,
    find_strategy,
    keep_mixed,
    loss_options,
    overlong_penalty,
)
from riskpo.config import TrainConfig
from riskpo.group_advantages import (
    GroupAdvantage,
    by_question,
    minus_mean,
)
from riskpo.metrics.step import all_equal, by_stratum, risk_curves, sampled_entropy
from riskpo.preflight import ALGORITHMS
from riskpo.rollout.collect import MAX_ATTEMPTS, Batch, collect, draw, shaped_rewards
from riskpo.types import Question, Rollouts
from riskpo_kernels import RiskPOAdvantage
from tests.toy import verdicts_of

QUESTIONS = [Question(f"q{i}", f"{i}", str(i)) for i in range(50)]


ALONE = ("riskpo-paper", "riskpo-batch", "riskpo-none", "riskpo-seeking")  # compare with quantiles


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_response_is_refused_where_its_advantage_would_always_be_0(name):
    config = TrainConfig(algorithm=name, responses_per_question=1, max_response_tokens=16)
    if name == "distill":
        assert not find_strategy(name).advantage(config)(torch.ones(3), ["q"] * 3, step=1)[0].any()
        return
    if name in ALONE:
        advantage = find_strategy(name).advantage(config)
        ids = [f"q{i}" for i in range(40)]
        assert advantage((torch.arange(40) % 3 == 0).float(), ids, step=1)[0].any()
        return
    with pytest.raises(ValueError, match="responses_per_question=1 .* at least 2"):
        find_strategy(name).advantage(config)


def test_one_response_is_refused_where_no_config_is_seen():
    rewards = torch.tensor([1.0, 0.0])
    with pytest.raises(ValueError, match="at least 2"):
        GroupAdvantage(minus_mean)(rewards, ["a", "b"], step=1)
    for settings in (
        {"baseline": "leave-one-out"},
        {"form": "mean"},
        {"preset": "official-easy"},
        {"preset": "official-hard"},
    ):
        with pytest.raises(ValueError, match="1 response per question"):
            RiskPOAdvantage(**{"bundle_size": 2} | settings)(rewards, ["a", "b"], step=1)


@pytest.mark.parametrize(
    "length, limit, buffer, penalty",
    [
        (16384, 20480, 4096, 0.0),
        (17408, 20480, 4096, -0.25),
        (18432, 20480, 4096, -0.5),
        (20480, 20480, 4096, -1.0),
        (30000, 20480, 4096, -1.0),
        (2048, 3072, 1024, 0.0),
        (2304, 3072, 1024, -0.25),
        (3072, 3072, 1024, -1.0),
        (10, 5, 0, 0.0),
    ],
)
def test_overlong_golden(length, limit, buffer, penalty):
    assert overlong_penalty(length, limit, buffer) == penalty


def test_rows_say_what_the_papers_say():
    loss = {name: row.loss for name, row in STRATEGIES.items()}
    assert (loss["dapo"].clip_low, loss["dapo"].clip_high) == (0.2, 0.28)
    assert loss["dapo"].aggregate == "token-mean" and STRATEGIES["dapo"].keep is keep_mixed
    assert (loss["riskpo-paper"].ratio, loss["riskpo-paper"].clip_low) == ("sequence", 3e-4)
    assert loss["riskpo-official-easy"].dual_clip == 3.0
    assert loss["gspo"] == loss["riskpo-paper"]
    assert [n for n, row in STRATEGIES.items() if row.overlong] == ["dapo"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_row_gives_finite_detached_advantages(name):
    config = TrainConfig(algorithm=name, max_response_tokens=16)
    rewards = (torch.rand(320, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    ids = [f"q{i}" for i in range(40) for _ in range(8)]
    advantage, stats = find_strategy(name).advantage(config)(rewards, ids, step=1)
    assert advantage.shape == (320,) and advantage.isfinite().all()
    assert advantage.any() == (name != "distill")
    assert not advantage.requires_grad and all(isinstance(v, float) for v in stats.values())


def test_config_overrides_the_row():
    config = TrainConfig(baseline="batch", bundle_size=4, clip_high=0.1, max_response_tokens=16)
    strategy = find_strategy("riskpo-paper")
    settings = strategy.advantage(config).settings
    assert (settings.baseline, settings.bundle_size, settings.omega) == ("batch", 4, 0.5)
    assert loss_options(strategy, config).clip_high == 0.1
    assert loss_options(strategy, config).clip_low == 3e-4
    assert loss_options(find_strategy("dr-grpo"), config).constant == 16.0


def test_the_names_that_commands_know_before_torch():
    assert tuple(STRATEGIES) == ALGORITHMS


def test_refusals():
    with pytest.raises(ValueError, match="Did you mean 'riskpo-paper'"):
        find_strategy("riskpo_papr")
    with pytest.raises(ValueError, match="questions_per_step=40 with bundle_size=7"):
        find_strategy("riskpo-paper").advantage(TrainConfig(bundle_size=7))
    with pytest.raises(ValueError, match="got baseline with algorithm='grpo'"):
        find_strategy("grpo").advantage(TrainConfig(algorithm="grpo", baseline="none"))
    with pytest.raises(ValueError, match="question-major"):
        by_question(torch.zeros(4), ["a", "b", "a", "b"])
    with pytest.raises(ValueError, match="question-major"):
        by_question(torch.zeros(5), ["a", "a", "b", "b", "b"])


def test_risk_curves_of_a_golden_batch():
    """Scores 0..5 once each: the golden G1 of the algorithm notes."""
    rewards_QG = (torch.arange(6)[None] > torch.arange(5)[:, None]).float()
    curves = risk_curves(rewards_QG)
    assert curves["rvar_lower"] == pytest.approx(1 / 6) and curves["mvar"] == pytest.approx(1.55)
    assert risk_curves(torch.ones(3, 4)) == {}


def test_entropy_of_what_was_sampled():
    """All tokens of a uniform choice among four have the log-prob of a quarter."""
    assert sampled_entropy([torch.full((7,), 0.25).log()]) == pytest.approx(torch.tensor(4.0).log())
    assert sampled_entropy([torch.zeros(0)]) == 0.0


def test_missing_log_probs_are_left_out_of_what_was_sampled():
    given = torch.tensor([-1.0, float("nan"), -3.0])
    assert sampled_entropy([given]) == 2.0 and sampled_entropy([given[1:2]]) == 0.0


def test_groups_that_are_all_equal():
    rewards_QG = torch.tensor([[1.0, 1], [0, 1], [0, 0], [-1, 0]])
    assert all_equal(rewards_QG) == {"all_wrong_fraction": 0.5, "all_right_fraction": 0.25}


def test_rewards_by_stratum():
    questions = [Question(str(i), "?", "1", meta={"stratum": "ab"[i % 2]}) for i in range(3)]
    rewards_QG = torch.tensor([[1.0, 1], [0, 1], [0, 0]])
    assert by_stratum(questions, rewards_QG) == {"reward_a": 0.5, "reward_b": 0.5}
    assert by_stratum(QUESTIONS[:3], rewards_QG) == {}


def test_rows_that_differ_in_their_baseline_only():
    rewards = (torch.rand(320, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    ids = [f"q{i}" for i in range(40) for _ in range(8)]
    found = {
        name: find_strategy(name).advantage(TrainConfig())(rewards, ids, step=1)[0]
        for name in ("riskpo-paper", "riskpo-none", "riskpo-batch", "riskpo-loo")
    }
    assert found["riskpo-paper"].max() == 0  # nothing is ever pushed up
    assert found["riskpo-batch"].mean().abs() < 1e-6 and found["riskpo-loo"].mean().abs() < 1e-6
    for name in ("riskpo-none", "riskpo-batch"):
        assert (found[name] - found["riskpo-paper"]).std() < 1e-6  # a constant apart


# One step's batch --------------------------------------------------------------------------


class FakeSampler:
    """Two responses of `length` tokens per question; text says which response it is."""

    def __init__(self, length: int = 3) -> None:
        self.length, self.asked = length, []

    def sample(self, questions, responses, stream):
        self.asked.append([q.id for q in questions])
        rollouts = Rollouts()
        for q in questions:
            for j in range(responses):
                rollouts.tokens.append(torch.arange(self.length + 1))
                rollouts.prompt_len.append(1)
                rollouts.logprob.append(torch.zeros(self.length))
                rollouts.text.append(f"{q.id}/{j}")
                rollouts.truncated.append(False)
                rollouts.question_id.append(q.id)
        return rollouts


def one_in_three_is_mixed(texts, questions):
    """Both right, both wrong, or one right, by the question's number."""
    rewards = []
    for q in questions:
        rewards += [(1.0, 1.0), (0.0, 0.0), (1.0, 0.0)][int(q.gold) % 3]
    return verdicts_of(rewards)


def gather(name, sampler, judge=one_in_three_is_mixed, step=1):
    strategy = find_strategy(name)
    settings = TrainConfig(questions_per_step=6, responses_per_question=2, seed=3)
    return collect(sampler, judge, QUESTIONS, strategy, settings, step)


def test_without_a_filter_one_attempt_is_the_batch():
    sampler = FakeSampler()
    batch = gather("grpo", sampler)
    assert len(sampler.asked) == 1 and len(batch.questions) == 6 and len(batch.rollouts) == 12
    assert batch.rollouts.question_id == [q.id for q in batch.questions for _ in range(2)]


@pytest.mark.parametrize("step", range(1, 7))
def test_dynamic_sampling_refills_with_mixed_questions(step):
    sampler = FakeSampler()
    batch = gather("dapo", sampler, step=step)
    assert len(batch.questions) == 6 and len(sampler.asked) > 1
    assert all(int(q.gold) % 3 == 2 for q in batch.questions)
    assert (batch.rewards_QG == torch.tensor([1.0, 0.0])).all()
    everything = sum(sampler.asked, [])
    assert len(everything) == len(set(everything)) == len(batch.seen_QG)
    assert batch.rollouts.text == [f"{q.id}/{j}" for q in batch.questions for j in range(2)]


def test_dynamic_sampling_gives_up_at_the_cap():
    def all_right(texts, questions):
        return verdicts_of([1.0] * len(texts))

    sampler = FakeSampler()
    batch = gather("dapo", sampler, all_right)
    assert len(sampler.asked) <= MAX_ATTEMPTS and not batch.questions and not len(batch.rollouts)
    assert batch.seen_QG.mean() == 1


def test_questions_are_a_function_of_seed_and_step():
    steps = [[q.id for q in draw(QUESTIONS, 6, seed=0, step=s)] for s in range(1, 17)]
    assert steps == [[q.id for q in draw(QUESTIONS, 6, seed=0, step=s)] for s in range(1, 17)]
    epoch = sum(steps[:8], [])
    assert len(set(epoch)) == 48  # an epoch shows no question twice
    assert steps[8:] != steps[:8] and all(len(set(s)) == 6 for s in steps)
    assert steps[0] != [q.id for q in draw(QUESTIONS, 6, seed=1, step=1)]
    with pytest.raises(ValueError, match="questions_per_step=51"):
        draw(QUESTIONS, 51, seed=0, step=1)


def test_overlong_penalty_stays_outside_the_rewards():
    batch = Batch(
        rollouts=FakeSampler(length=10).sample(QUESTIONS[:1], 2, (0,)), rewards_QG=torch.ones(1, 2)
    )
    assert shaped_rewards(batch, 0.2, 10).tolist() == [0.0, 0.0]
    assert shaped_rewards(batch, 0.0, 10).tolist() == [1.0, 1.0]
    assert batch.rewards_QG.tolist() == [[1.0, 1.0]]

"""RiskPOTrainer on the CPU: whose advantages, when the tracker moves, what a checkpoint holds."""

import json

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'riskpo[trl]'")

import pandas as pd  # noqa: E402

from riskpo.integrations.common import draw_numbers  # noqa: E402
from riskpo.integrations.trl.rows import answer_key, question_ids, question_key  # noqa: E402
from riskpo.integrations.trl.trainer import STATE_FILE  # noqa: E402
from riskpo_kernels import RiskPOAdvantage  # noqa: E402
from tests.integrations.trl_toy import GENERATIONS, losses, questions, trainer  # noqa: E402


def state_of(run) -> dict:
    return json.loads(json.dumps(run._riskpo_state()))


@pytest.mark.parametrize(
    "preset, index",
    [("paper", False), ("official-easy", True), ("official-hard", True), ("matched", False)],
)
def test_the_advantages_are_those_of_the_generation_batch(tmp_path, preset, index):
    """Of both accumulation steps together, recomputed from what TRL logged."""
    by_column = {"riskpo_difficulty": "prior", "riskpo_prior_column": "pass_rate"}
    run = trainer(
        tmp_path,
        riskpo_preset=preset,
        gradient_accumulation_steps=2,
        max_steps=1,
        log_completions=True,
        **(by_column if preset == "matched" else {}),
    )
    seen = []
    host_loss = run._compute_loss

    def spy(model, inputs):
        for ids, mask, advantage in zip(
            inputs["completion_ids"],
            inputs["completion_mask"],
            inputs["advantages"].tolist(),
            strict=True,
        ):
            seen.append((answer_key(ids[mask != 0].tolist()), advantage))
        return host_loss(model, inputs)

    run._compute_loss = spy
    run.train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    gold = {row["prompt"]: row for row in questions()}
    ids = question_ids([question_key(gold[p], None) for p in table["prompt"]], GENERATIONS)
    assert len(table) == len(seen) == 16 and len(set(ids)) == 4
    options, given = {}, {}
    if preset == "matched":
        options = {"difficulty": "prior"}
        given = {"prior": [gold[p]["pass_rate"] for p in table["prompt"]]}
    advantage_of = RiskPOAdvantage(preset, bundle_size=2, seed=run.args.seed, **options)
    sampled = run._scored[1]
    expected, stats = advantage_of(
        torch.tensor(table["token_share"].to_numpy()),
        ids,
        step=0,
        draw=None if index else draw_numbers(ids, sampled),
        **given,
    )
    assert table["advantage"].tolist() == pytest.approx(expected.tolist(), abs=1e-7)
    assert sorted(seen) == sorted(zip(sampled, expected.tolist(), strict=True))
    assert len({a for _, a in seen}) > 2
    logged = run.state.log_history[0]
    assert logged["riskpo/mvar"] == pytest.approx(stats["mvar"])
    assert state_of(run)["advantage"] == json.loads(json.dumps(advantage_of.state_dict()))


@pytest.mark.parametrize(
    "schedule, batches",
    [
        ({"max_steps": 3}, 3),
        ({"max_steps": 4, "num_iterations": 2, "steps_per_generation": 2}, 1),
        ({"max_steps": 2, "gradient_accumulation_steps": 4}, 2),
        ({"max_steps": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 1}, 4),
    ],
    ids=["plain", "reuse", "accumulation", "two-batches-per-step"],
)
def test_the_tracker_moves_once_per_generation_batch(tmp_path, schedule, batches):
    run = trainer(tmp_path, **schedule)
    calls = []
    advantage_of = run.riskpo.advantage

    def counted(*args, **kwargs):
        calls.append(kwargs["step"])
        return advantage_of(*args, **kwargs)

    counted.settings, counted.state_dict = advantage_of.settings, advantage_of.state_dict
    run.riskpo.advantage = counted
    run.train()
    assert calls == list(range(batches))
    assert advantage_of.state_dict()["last_step"] == batches - 1


def test_evaluation_leaves_the_tracker_alone(tmp_path):
    run = trainer(
        tmp_path,
        eval_dataset=questions(4),
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        per_device_eval_batch_size=4,
    )
    before = state_of(run)
    numbers = run.evaluate()
    assert state_of(run) == before and before["advantage"]["last_step"] is None
    assert numbers["eval_loss"] == 0.0 and numbers["eval_reward"] > 0
    assert set(run._logs["advantages"]) == {0.0}
    run.train()
    assert sum("eval_loss" in row for row in run.state.log_history) == 3
    assert state_of(run)["generation_batches"] == 2
    assert state_of(run)["advantage"]["last_step"] == 1


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": "adamw_torch"}
    whole = trainer(tmp_path / "whole", **saving)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    saved = json.loads((checkpoint / STATE_FILE).read_text())
    assert saved["generation_batches"] == 2 and saved["advantage"]["last_step"] == 1
    assert not list(checkpoint.glob("*.unfinished"))
    rest = trainer(tmp_path / "rest", **saving)
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert losses(rest) == losses(whole) and len(losses(rest)) == 4
    assert any(losses(rest)[2:])
    assert state_of(rest) == state_of(whole)
    assert list(rest._logs["advantages"]) == list(whole._logs["advantages"])
    for a, b in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(tmp_path, **saving).train()
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(ValueError, match=r"got \{'omega': 1\.0\}; expected .*'omega': 0\.5"):
        other = trainer(tmp_path / "other", riskpo_omega=1.0, max_steps=2)
        other.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises(ValueError, match=f"without {STATE_FILE}"):
        trainer(tmp_path / "more", max_steps=2).train(resume_from_checkpoint=str(checkpoint))


def test_rows_are_known_by_question_and_answer_not_by_place(tmp_path):
    rewards = torch.tensor([0.0, 1.0, 2.0, 3.0, 1.0, 1.0, 4.0, 0.0, 2.0, 2.0, 2.0, 2.5, 0, 1, 0, 1])
    keys = [f"question {i // GENERATIONS}" for i in range(16)]
    answers = [answer_key([i, 3 * i]) for i in range(16)]
    expected = trainer(tmp_path)._advantages(rewards, keys, answers)
    assert len(set(expected.tolist())) == 4
    order = torch.randperm(16)
    moved = trainer(tmp_path)._advantages(
        rewards[order], [keys[i] for i in order], [answers[i] for i in order]
    )
    assert torch.equal(moved, expected[order])


def test_a_completion_without_any_reward_is_an_error(tmp_path):
    def sometimes(completions, **_):
        return [None, *([1.0] * (len(completions) - 1))]

    with pytest.raises(ValueError, match="1 rewards that are NaN.*Give a failed verification"):
        trainer(tmp_path, reward=sometimes).train()


def test_a_question_met_twice_is_two_questions():
    assert question_ids(["a", "a", "b", "b", "a", "a"], 2) == ["a", "a", "b", "b", "a/1", "a/1"]
    with pytest.raises(ValueError, match="3 answers to question 'a'.*num_generations=2"):
        question_ids(["a", "a", "a"], 2)


def test_draws_number_each_question_and_keep_equal_answers_in_place():
    numbers = draw_numbers(["p", "q", "p", "q", "p"], ["z", "b", "a", "b", "a"])
    assert numbers == [2, 0, 0, 1, 1]


def test_a_question_is_its_row_or_its_column():
    row = {"prompt": "1 + 1", "gold": "2"}
    assert question_key(row, None) == question_key(dict(reversed(row.items())), None)
    assert question_key(row, None) != question_key({**row, "gold": "3"}, None)
    assert question_key({**row, "id": 7}, "id") == "7"
    with pytest.raises(ValueError, match="without the column 'id'.*'gold', 'prompt'"):
        question_key(row, "id")
    with pytest.raises(ValueError, match="not all plain values.*riskpo_question_column"):
        question_key({**row, "image": object()}, None)

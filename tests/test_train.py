"""The page from end to end: every algorithm, the embedded task, and real questions."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

import riskpo.run
from riskpo.algorithms import STRATEGIES
from riskpo.cli import main
from riskpo.config import ColumnsConfig, TrainConfig
from riskpo.demo import (
    build_model,
    build_questions,
    build_tokenizer,
    find_task,
    task_questions,
    warm_start,
)
from riskpo.memory_plan import run_plan
from riskpo.report.logs import read_records, step_line
from riskpo.rollout.sampler import prompt_tokens
from riskpo.train import train
from riskpo_kernels import RiskPOAdvantage
from tests.toy import save_arithmetic, save_byte_model, verdicts_of

SMALL = {
    "questions_per_step": 10,
    "responses_per_question": 4,
    "eval_questions": 10,
    "eval_samples": 2,
    "save_every_steps": 0,
}


@pytest.fixture
def cold_start(monkeypatch):
    """No supervised steps: these tests are about the loop, not about learning."""
    monkeypatch.setattr(riskpo.run, "warm_start", lambda *args, **kwargs: (0, 0.0))


def test_ten_steps_of_the_embedded_task(tmp_path, cold_start, capsys):
    config = TrainConfig(run_dir=str(tmp_path / "demo"), steps=10, eval_every_steps=5, **SMALL)
    folder = train(config)
    steps, evaluations = read_records(folder, "step"), read_records(folder, "eval")
    assert [r["step"] for r in steps] == list(range(1, 11))
    assert [r["step"] for r in evaluations] == [0, 5, 10]
    for name in ("reward_mean", "rvar_lower", "q_alpha", "q_beta", "entropy", "grad_norm"):
        assert all(isinstance(r[name], float) for r in steps), name
    assert all(r["sampler_kl"] < 1e-8 and r["skipped_updates"] == 0 for r in steps)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "with baseline='leave-one-out'" in printed
    assert "wrong, expected" in printed and "curves.png" in printed
    plain = [line for line in printed.splitlines() if str(tmp_path) not in line]
    assert len(plain) > 15 and max(map(len, plain)) <= 120
    assert main(["plot", str(folder)]) == 0
    assert lines_of_memory(printed) == ("memory plan: below 0.1 GiB on cpu", 1)


def lines_of_memory(printed):
    """(what was planned before the first step, how often the outcome stands behind the last)."""
    lines = printed.splitlines()
    steps = [i for i, line in enumerate(lines) if line.startswith(("step ", "held out after"))]
    plan = [i for i, line in enumerate(lines) if line.startswith("memory plan")]
    outcome = [i for i, line in enumerate(lines) if line.startswith("memory over the loaded model")]
    assert plan and plan[-1] < steps[0]
    pattern = r"predicted \d+ MiB, measured \d+ MiB \((resident set|allocated).*\)$"
    assert all(i > steps[-1] and re.search(pattern, lines[i]) for i in outcome)
    return "\n".join(lines[i] for i in plan), len(outcome)


def test_a_larger_run_prints_its_plan_by_moment(tmp_path, cold_start, capsys, monkeypatch):
    """Planned for the data's longest prompt, not for the limit."""
    monkeypatch.setattr(run_plan, "SMALL_GIB", 0.0)
    config = TrainConfig(
        run_dir=str(tmp_path), steps=1, eval_every_steps=0, micro_batch_tokens=200_000,
        max_prompt_tokens=150_000, max_response_tokens=8, **SMALL,
    )  # fmt: skip
    train(config)
    plan, outcomes = lines_of_memory(capsys.readouterr().out)
    moments, largest, lengths = plan.splitlines()
    assert outcomes == 1
    for doing in ("updating", "stepping", "reading prompts", "sampling"):
        assert f"{doing} <0.1" in moments, "150,000 tokens would take more"
    assert largest.startswith("memory plan, largest: ")
    data = task_questions(find_task(None), config.seed)
    longest = max(len(prompt_tokens(build_tokenizer(), q.prompt)) for q in data)
    assert longest < 20 and f"data has {longest} tokens, a response at most 8" in lengths


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_algorithm_takes_two_steps(name, tmp_path):
    model, data = save_arithmetic(tmp_path)

    def right_by_chance(texts, questions):
        """An untrained model is never right: reward what half of its answers have."""
        return verdicts_of(float(len(t) % 2) for t in texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "riskpo.rewards.scorer.Scorer.verdicts", lambda self, t, q: right_by_chance(t, q)
        )
        config = TrainConfig(
            run_dir=str(tmp_path / name),
            algorithm=name,
            model=str(model),
            data=str(data),
            teacher=str(model) if name == "distill" else None,
            steps=2,
            learning_rate=1e-3,
            max_response_tokens=6,
            **SMALL,
        )
        steps = read_records(train(config), "step")
    # distill's teacher is the student: it learns from what the first step has changed
    assert len(steps) == 2 and all(r["grad_norm"] > 0 for r in steps[name == "distill" :])
    assert all(r["entropy"] > 0 and r["skipped_updates"] == 0 for r in steps)


def test_matched_bundles_are_made_by_a_column_of_the_data(tmp_path, monkeypatch):
    """Every response brings its own row's number; a row without one is named before a step."""
    model, data = save_arithmetic(tmp_path)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["pass_rate"] = i / 100
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        run_dir=str(tmp_path / "run"), algorithm="riskpo-matched", difficulty="prior",
        model=str(model), data=str(data), columns=ColumnsConfig(prior="pass_rate"), steps=1,
        learning_rate=1e-3, max_response_tokens=6, eval_every_steps=0, **SMALL,
    )  # fmt: skip
    seen, call = [], RiskPOAdvantage.__call__

    def spy(self, rewards, ids, **given):
        seen.append((ids, given["prior"]))
        return call(self, rewards, ids, **given)

    monkeypatch.setattr(RiskPOAdvantage, "__call__", spy)
    train(config)
    ((ids, prior),) = seen
    truth = {f"arithmetic/{row['id']}": row["pass_rate"] for row in rows}
    assert len(set(prior)) == 10 and prior == [truth[name] for name in ids]
    rows[7]["pass_rate"] = None
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="columns.prior: 'pass_rate' of question .*got None"):
        train(replace(config, run_dir=str(tmp_path / "other")))


@pytest.mark.parametrize(
    "source",
    [
        "problems/gsm8k_train.jsonl",
        pytest.param("verl/math_train_lighteval.parquet", marks=pytest.mark.nightly),
    ],
)
def test_two_steps_on_real_questions(source, shared_data, tmp_path):
    model = save_byte_model(tmp_path / "model")
    out = tmp_path / "result.json"
    arguments = (
        f"train --model {model} --data {shared_data / source} --run-dir {tmp_path / 'run'} "
        "--steps 2 --questions-per-step 5 --responses-per-question 2 --max-response-tokens 12 "
        "--max-prompt-tokens 400 --eval-questions 3 --eval-samples 2 --save-every-steps 2 "
        "--updates-per-step 1 --micro-batch-tokens 2048"
    )
    assert main(arguments.split()) == 0
    steps = read_records(tmp_path / "run", "step")
    assert len(steps) == 2 and all(r["sampler_kl"] < 1e-6 for r in steps)
    outcomes = {k: v for k, v in steps[0].items() if k.startswith("outcome_")}
    assert sum(outcomes.values()) == 10 and outcomes["outcome_crash"] == 0
    arguments = (
        f"eval --model {tmp_path / 'run'} --data {shared_data / source} --questions 3 "
        f"--samples 2 --ks 1 2 --max-response-tokens 8 --max-prompt-tokens 2000 --out {out}"
    )
    assert main(arguments.split()) == 0
    assert json.loads(out.read_text())["questions"] == 3


def test_tensorboard_by_name(tmp_path, cold_start):
    config = TrainConfig(
        run_dir=str(tmp_path), steps=1, eval_every_steps=0, log_with=("tensorboard",), **SMALL
    )
    train(config)
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_a_finished_run_adds_nothing(tmp_path, cold_start, capsys):
    settings = {**SMALL, "save_every_steps": 1}
    config = TrainConfig(run_dir=str(tmp_path), steps=1, eval_every_steps=0, **settings)
    train(config)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    train(config)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert "all 1 steps are done; a larger --steps goes on" in capsys.readouterr().out
    train(replace(config, steps=2))
    rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "reward_mean" in row] == [1, 2]


def test_one_line_fits_the_terminal():
    numbers = dict.fromkeys(
        ("reward_mean", "rvar_lower", "q_alpha", "q_beta", "entropy", "clip_fraction"), 0.12345
    )
    line = step_line(7, 99999, numbers | {"grad_norm": 1.234e-5, "skipped_updates": 3, "time_s": 9})
    assert len(line) <= 120 and "SKIPPED 3" in line and line.startswith("step     7/99999")
    assert "tail" not in step_line(1, 1, {"reward_mean": 0.0})


# The embedded task -------------------------------------------------------------------------


def test_sums_are_right_and_different():
    questions = build_questions(500, 0)
    assert len({q.id for q in questions}) == 500
    for q in questions:
        a, b = q.prompt.rstrip("=").split("+")
        assert int(q.gold[::-1]) == int(a) + int(b) and len(q.gold) == 4
    assert {q.meta["digits"] for q in questions} == {2, 3, 4, 5, 6}
    assert questions == build_questions(500, 0) != build_questions(500, 1)


def test_tokenizer_is_one_token_per_character(tmp_path):
    tokenizer = build_tokenizer()
    ids = tokenizer("012+345=")["input_ids"]
    assert len(ids) == 8 and tokenizer.decode(ids) == "012+345="
    tokenizer.save_pretrained(tmp_path)
    assert type(tokenizer).from_pretrained(tmp_path)("9=")["input_ids"] == [11, 13]


def test_warm_start_lowers_the_loss_and_stops_at_its_target():
    tokenizer = build_tokenizer()
    model, questions = build_model(tokenizer, 0), build_questions(200, 0)
    measured = iter([0.1, 0.2, 0.5])
    steps, reached = warm_start(
        model, tokenizer, questions, find_task(None), lambda: next(measured), seed=0, check_every=4
    )
    assert (steps, reached) == (12, 0.5)
    assert all(p.grad is None for p in model.parameters())

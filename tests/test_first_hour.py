"""What a newcomer sees: the first prompt, the texts, how long it takes, and what goes wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from riskpo.compare.launch import _quietly, how_far, share_done
from riskpo.config import TrainConfig
from riskpo.report import progress
from riskpo.report.logs import RunLog, read_records, step_line
from riskpo.report.progress import evaluation_line, sampling_progress, slow_progress, spoken
from riskpo.train import train
from tests.toy import save_arithmetic, verdicts_of


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def kept_steps(folder):
    return {record["step"] for kind in ("step", "eval") for record in read_records(folder, kind)}


def test_a_run_shows_its_first_prompt_and_keeps_texts(tmp_path, monkeypatch, capsys):
    model, data = save_arithmetic(tmp_path)

    def verdicts(self, texts, questions):
        """Right where the length is odd; no question's first two."""
        each = len(texts) // len(questions)
        rewards = [float(len(t) % 2 and i % each > 1) for i, t in enumerate(texts)]
        return verdicts_of(rewards)

    monkeypatch.setattr("riskpo.rewards.scorer.Scorer.verdicts", verdicts)
    monkeypatch.setattr("riskpo.report.progress.SLOW_S", 0.0)
    config = TrainConfig(
        run_dir=str(tmp_path / "run"), model=str(model), data=str(data), steps=2, log_texts=7,
        max_response_tokens=6, questions_per_step=5, responses_per_question=4, eval_questions=4,
        eval_samples=2, eval_every_steps=0, save_every_steps=1,
    )  # fmt: skip
    folder = train(config)
    printed = capsys.readouterr().out
    assert "first prompt (" in printed and "as the model reads it: '" in printed
    for told in ("step 1: sampling, 0 s so far", "step 2: updating, 0 s so far"):
        assert told in printed
    assert "reward 0 (wrong)" in printed and "no advantage is above zero" in printed
    assert "held out before training: 4 questions, 8 responses of at most 6 tokens" in printed
    steps, rows = read_records(folder, "step"), rows_of(folder)
    assert [row["step"] for row in rows] == [1] * 7 + [2] * 7
    assert len({row["question_id"] for row in rows[:5]}) == 5
    fields = {"step", "question_id", "prompt", "gold", "response", "verdict", "reward"}
    fields |= {"truncated"}
    assert all(row.keys() == fields for row in rows)
    for record in steps:
        assert record["skipped_responses"] == 20 * record["zero_advantage_fraction"]
    cut = [row["truncated"] for row in rows[:7]]
    assert all(isinstance(c, bool) for c in cut) and any(cut) == (
        steps[0]["truncated_fraction"] > 0
    )
    first = (folder / "rollouts.jsonl").read_bytes()
    log = RunLog(config, first_step=1)  # as a resumed run opens it
    log.close()
    assert rows_of(folder) == rows[:7] and kept_steps(folder) == {0, 1}
    log = RunLog(config, first_step=0)  # as a new run in the same folder
    log.close()
    assert kept_steps(folder) == set() and (folder / "metrics.previous.jsonl").exists()
    assert rows_of(folder) == [] and first.startswith(
        (folder / "rollouts.previous.jsonl").read_bytes()
    )


def test_a_step_that_is_mostly_cut_warns_once_and_texts_are_bounded(tmp_path, capsys):
    log = RunLog(TrainConfig(run_dir=str(tmp_path)), first_step=0)
    for step, share in enumerate((0.5, 0.75, 1.0), start=1):
        log.step(step, {"reward_mean": 0.0, "truncated_fraction": share})
    log.texts(1, [{"response": "x" * 9999, "reward": 1.0}])
    log.close()
    printed = capsys.readouterr().out
    assert printed.count("warning:") == 1 and "75% of this step's responses" in printed
    assert "cut 50%" in printed and "cut 100%" in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert len(rows_of(tmp_path)[0]["response"]) == 4000


def test_the_line_names_what_goes_wrong_and_fits():
    fine = {"reward_mean": 0.5, "zero_advantage_fraction": 0.0, "truncated_fraction": 0.0}
    assert step_line(1, 9, fine) == "step 1/9  reward 0.500"
    names = ("reward_mean", "rvar_lower", "q_alpha", "q_beta", "entropy", "clip_fraction", "time_s")
    wrong = {
        **dict.fromkeys(names, 0.12345), "grad_norm": 1.234e-5, "skipped_updates": 3,
        "zero_advantage_fraction": 0.8, "truncated_fraction": 0.6, "verifier_crash_KeyError": 12.0,
        "verifier_crash_process": 3.0,
    }  # fmt: skip
    line = step_line(7, 99999, wrong)
    for word in ("zero 80%", "cut 60%", "CRASH KeyError 12", "CRASH process 3", "SKIPPED 3"):
        assert word in line
    assert len(line) <= 120 and "reward 0.123" in line and line.endswith("0.12 s")


def test_time_left_of_an_evaluation(monkeypatch):
    """Eight of two batches of at most 10 tokens are sampled; then an engine does it by itself."""
    model, said = torch.nn.Linear(2, 2), list[str]()
    given = {"responses": 5, "sequences": 4, "tokens": 10, "say": said.append}
    monkeypatch.setattr(progress, "FIRST_S", 0.2)
    with sampling_progress(model, **given):
        for _ in range(8):
            model(torch.zeros(1, 2))
        time.sleep(0.7)
    assert said[0].startswith("evaluation: 40% of the tokens at most, at most ")
    assert len(said) in (1, 2), "a line comes when the time has doubled"
    assert [evaluation_line(3.0 * n, n, 20) for n in (2, 4, 8)] == [
        "evaluation: 10% of the tokens at most, at most 54 s left",
        "evaluation: 20% of the tokens at most, at most 48 s left",
        "evaluation: 40% of the tokens at most, at most 36 s left",
    ]
    with sampling_progress(model, **given):
        time.sleep(0.3)
    assert said[-1] == "evaluation: 0 s so far"
    assert [spoken(s) for s in (40, 600, 9000)] == ["40 s", "10 min", "2.5 h"]


def test_a_slow_step_speaks_whatever_it_waits_for(monkeypatch):
    said = list[str]()
    monkeypatch.setattr(progress, "SLOW_S", 0.1)
    with slow_progress("step 3: sampling", said.append):
        time.sleep(0.3)
    before = list(said)
    assert before and set(before) == {"step 3: sampling, 0 s so far"}
    time.sleep(0.2)
    assert said == before


def test_a_comparison_takes_no_more_threads_than_it_is_given():
    before = torch.get_num_threads()
    for given in (1, 3):
        torch.set_num_threads(given)
        assert _quietly(lambda: str(torch.get_num_threads()), 2) == str(min(given, 2))
    torch.set_num_threads(before)


KILLED = """
import os, signal, time
from pathlib import Path
from types import SimpleNamespace
from riskpo.compare import launch

def killed(pool, *given):
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 60)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    launch._gather = killed
    launch.run_all(SimpleNamespace(model="none"), {}, [], Path(), jobs=1)
"""


def test_the_runs_of_a_killed_comparison_end(tmp_path):
    """The output stays open as long as a worker lives."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    ended = subprocess.run([sys.executable, script], capture_output=True, check=False, timeout=40)
    assert int(ended.stdout) and ended.returncode == -signal.SIGKILL


def test_how_far_a_comparison_is(tmp_path):
    line = how_far(1, 4, {"grpo, seed 0": 0.5, "dapo, seed 0": 0.0}, 60.0)
    assert line.startswith("compare: 1 of 4 done after 60 s, about 2 min left; running: ")
    assert line.endswith("grpo, seed 0 50%, dapo, seed 0")
    assert "no estimate yet" in how_far(0, 4, {"start, seed 0": 0.0}, 60.0)
    # What earlier commands did says nothing of this one's speed.
    assert "about 60 s left" in how_far(6, 8, {"grpo, seed 0": 0.5}, 20.0, before=6.0)
    assert "no estimate yet" in how_far(6, 8, {"grpo, seed 0": 0.01}, 20.0, before=6.0)
    config = TrainConfig(run_dir=str(tmp_path), steps=8)
    assert share_done(config) == 0.0
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 2}\n{"kind": "eval"')
    assert share_done(config) == pytest.approx(0.25)

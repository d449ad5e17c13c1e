"""avg@k, pass@k and their intervals against numbers worked out by hand."""

import json
import math
import shutil
from dataclasses import asdict

import pytest
import torch

from riskpo.cli import main
from riskpo.eval import questions_of
from riskpo.eval_config import EvalConfig
from riskpo.files import write_json
from riskpo.metrics.evaluate import EvalSettings, evaluate, over_seeds
from riskpo.metrics.intervals import t_interval, t_points, wilson
from riskpo.rewards.scorer import Scorer
from riskpo.types import Question
from tests.toy import save_arithmetic, verdicts_of

SETTINGS = EvalSettings("tiny", "sums", temperature=1.0, max_response_tokens=8, seed=3)
QUESTIONS = [Question(f"q{i}", "?", "7", "arithmetic") for i in range(3)]
RIGHT = [0, 1, 4]  # of four samples each


def texts_of(samples):
    return ["7" if i < right else "8" for right in RIGHT for i in range(samples)]


def judged(texts, questions, scorer, **options):
    return evaluate(texts, questions, scorer.verdicts(texts, questions), **options)


def run(**changes):
    options = {"samples": 4, "ks": (1, 2, 4), "settings": SETTINGS, **changes}
    with Scorer() as scorer:
        return judged(texts_of(options["samples"]), QUESTIONS, scorer, **options)


def test_numbers_by_hand():
    result = run()
    assert result.avg.value == pytest.approx(5 / 12)
    assert result.pass_at[1].value == pytest.approx(5 / 12)
    assert result.pass_at[2].value == pytest.approx((0 + 3 / 6 + 1) / 3)  # 1 - C(3,2) / C(4,2)
    assert result.pass_at[4].value == pytest.approx(2 / 3)
    assert (result.counts["right"], result.counts["wrong"]) == (5, 7)
    assert result.rewards == {"q0": [0] * 4, "q1": [1, 0, 0, 0], "q2": [1] * 4}
    assert list(result.row()) == ["avg@4", "pass@1", "pass@2", "pass@4"]


def test_interval_is_seeded_and_covers_the_binomial_one():
    rewards = (torch.arange(400) % 5 == 0).float()  # one sample each, a fifth right
    questions = [Question(str(i), "?", "7") for i in range(400)]

    def evaluated(seed):
        settings = EvalSettings("m", "d", 1.0, 8, seed=seed)
        return evaluate(
            [""] * 400, questions, verdicts_of(rewards.tolist()),
            samples=1, ks=(1,), settings=settings,
        ).avg  # fmt: skip

    first = evaluated(0)
    assert first == evaluated(0) and first != evaluated(1)
    half = 1.96 * math.sqrt(0.2 * 0.8 / 400)
    assert first.low == pytest.approx(0.2 - half, abs=0.006)
    assert first.high == pytest.approx(0.2 + half, abs=0.006)


def test_negative_rewards_are_not_passes():
    with_penalty = torch.tensor([-1.0, 1.0, -1.0, -1.0])
    result = evaluate(
        [""] * 4, QUESTIONS[:2], verdicts_of(with_penalty.tolist()),
        samples=2, ks=(2,), settings=SETTINGS,
    )  # fmt: skip
    assert (result.avg.value, result.pass_at[2].value) == (-0.5, 0.5)


def test_result_is_written_with_its_settings(tmp_path):
    path = tmp_path / "deep" / "eval.json"
    write_json(path, asdict(run()))
    write_json(path, asdict(run()))
    written = json.loads(path.read_text())
    assert written["settings"] == {
        "model": "tiny", "data": "sums", "temperature": 1.0, "max_response_tokens": 8,
        "top_p": 1.0, "seed": 3,
    }  # fmt: skip
    assert written["samples"] == 4 and written["pass_at"]["4"]["value"] == pytest.approx(2 / 3)
    assert [p.name for p in path.parent.iterdir()] == ["eval.json"]


def test_misuse_is_explained():
    with pytest.raises(ValueError, match="ks=.5."):
        run(ks=(5,))
    with pytest.raises(ValueError, match="samples=0"):
        run(samples=0, ks=())
    with pytest.raises(ValueError, match="2 questions with 1 different ids"):
        evaluate([], QUESTIONS[:1] * 2, None, samples=1, ks=(1,), settings=SETTINGS)
    with pytest.raises(ValueError, match="no id twice"):
        evaluate([], [], None, samples=1, ks=(1,), settings=SETTINGS)
    with pytest.raises(ValueError, match="got 1 texts; expected 3 questions x 4"):
        evaluate(["7"], QUESTIONS, None, samples=4, ks=(1,), settings=SETTINGS)


# maj@k and seeds -----------------------------------------------------------------------------


def voting(texts, seed=0):
    """Three samples of two questions whose gold is 7."""
    with Scorer() as scorer:
        return judged(
            texts, QUESTIONS[:2], scorer, samples=3, ks=(1, 3),
            settings=EvalSettings("m", "d", 1.0, 8, seed=seed),
            vote=lambda text, question: text.strip() or None,
        )  # fmt: skip


def test_majority_by_hand():
    result = voting(["7", "7", "8", "8", "8", "7"])
    assert result.maj_at[1].value == pytest.approx(0.5)  # avg@3
    assert result.maj_at[3].value == pytest.approx((1 + 0) / 2)
    assert list(result.row()) == ["avg@3", "pass@1", "pass@3", "maj@1", "maj@3"]
    assert voting(["7", "8", "9", "7", "", ""]).values["maj@3"] == pytest.approx([1 / 3, 1.0])
    assert run().maj_at == {}


def test_two_intervals_around_one_mean():
    results = [voting(["7", "7", "8"] + ["8"] * 3), voting(["7"] * 3 + ["7", "8", "8"])]
    questions, seeds = over_seeds(results)["avg@3"]
    assert questions.value == pytest.approx(0.5) == seeds.value
    assert (seeds.low, seeds.high) == pytest.approx((0.5 - 12.706 / 6, 0.5 + 12.706 / 6))
    each = [(2 / 3 + 1) / 2, 1 / 6]  # of the two questions, over the seeds
    low, high = wilson(0.5, 2)  # two questions are few
    assert low < each[1] and (questions.low, questions.high) == pytest.approx((low, high))


def test_shared_questions_are_redrawn_whole():
    """Each question is right with one seed and wrong with the other: all questions are alike."""
    questions = [Question(str(i), "?", "7") for i in range(12)]
    halves = [["7"] * 6 + ["8"] * 6, ["8"] * 6 + ["7"] * 6]
    results = [
        judged(
            texts, questions, Scorer("exact"),
            samples=1, ks=(1,), settings=SETTINGS,
        )
        for texts in halves
    ]  # fmt: skip
    questions, seeds = over_seeds(results)["pass@1"]
    assert (questions.low, questions.high) == (0.5, 0.5) == (seeds.low, seeds.high)


def test_seeds_with_questions_of_their_own():
    settings = EvalSettings("m", "d", 1.0, 8)
    results = [
        judged(
            ["7"] * right + ["8"] * (4 - right), [Question(f"own{right}", "?", "7")],
            Scorer("exact"), samples=4, ks=(1,), settings=settings,
        )
        for right in (0, 4)
    ]  # fmt: skip
    questions, _ = over_seeds(results)["pass@1"]
    assert (questions.low, questions.value, questions.high) == (0.0, 0.5, 1.0)


@pytest.mark.parametrize("n", [2, 3, 5, 9, 31])
def test_t_points_against_the_density(n):
    """The density of Student's t, integrated over the interval, holds 95 %."""
    df = n - 1
    x = torch.linspace(-t_points(n), t_points(n), 200_001, dtype=torch.float64)
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    inside = torch.trapezoid(scale * (1 + x**2 / df) ** (-(df + 1) / 2), x)
    assert float(inside) == pytest.approx(0.95, abs=1e-4)


def test_one_value_has_no_interval():
    only = t_interval([0.3])
    assert (only.low, only.value, only.high) == (0.3, 0.3, 0.3) and not only.excludes_zero
    assert t_interval([0.3, 0.31, 0.32]).excludes_zero


def test_eval_command_over_seeds(tmp_path, capsys):
    """One run per seed by its path, on the questions that this run held out."""
    model, _ = save_arithmetic(tmp_path)
    for seed in (0, 1):
        shutil.copytree(model, tmp_path / f"seed-{seed}")
    out = tmp_path / "seeds.json"
    given = (
        f"eval --model {tmp_path}/seed-{{seed}} --data embedded:mixed --questions 3 --samples 2 "
        f"--ks 1 2 --seeds 0 1 --out {out}"
    )
    assert main(given.split()) == 0
    printed = capsys.readouterr().out
    assert "over 2 seeds" in printed and "maj@2" in printed
    written = json.loads(out.read_text())
    assert [r["settings"]["seed"] for r in written["seeds"]] == [0, 1]
    assert written["seeds"][0]["rewards"].keys() != written["seeds"][1]["rewards"].keys()
    assert set(written["numbers"]) == {"avg@2", "pass@1", "pass@2", "maj@1", "maj@2"}


def test_eval_reads_the_split_that_is_asked_for(monkeypatch):
    asked = []

    def read_hub(source, split):
        asked.append((source, split))
        return [{"question": "1+1", "answer": "2"}]

    monkeypatch.setattr("riskpo.data.questions.read_hub", read_hub)
    for split in ("test", None):
        questions_of(EvalConfig(data="owner/name", split=split))
    assert asked == [("owner/name", "test"), ("owner/name", "train")]


# Near 0 and 1 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("right", range(7))
def test_few_questions_leave_doubt_at_both_ends(right):
    """0 of 6 had the interval [0, 0]. Wilson's is where the score test does not reject."""
    questions = [Question(str(i), "?", "7") for i in range(6)]
    result = judged(
        ["7"] * right + ["8"] * (6 - right), questions, Scorer("exact"),
        samples=1, ks=(1,), settings=SETTINGS,
    )  # fmt: skip
    low, high = wilson(right / 6, 6)
    for share in (low, high):
        if 0 < share < 1:
            z = (right / 6 - share) / math.sqrt(share * (1 - share) / 6)
            assert abs(z) == pytest.approx(1.959964, rel=1e-6)
    for estimate in result.estimates().values():
        assert estimate.low <= low and estimate.high >= high and estimate.low < estimate.high
    twice = over_seeds([result, result])["pass@1"][1]
    assert (twice.low < twice.high) or 0 < right < 6
    assert result.texts["0"] == {
        "prompt": "?", "gold": "7", "responses": ["7" if right else "8"]
    }  # fmt: skip


def test_rewards_that_are_no_shares_keep_their_interval():
    questions = [Question(str(i), "?", "7") for i in range(6)]
    rewards = torch.tensor([-1.0] * 3 + [2.0] * 3)
    result = evaluate(
        [""] * 6, questions, verdicts_of(rewards.tolist()),
        samples=1, ks=(1,), settings=SETTINGS,
    )  # fmt: skip
    assert -1 <= result.avg.low < result.avg.high <= 2 and result.avg.high > 1

"""avg@k, pass@k and their intervals against numbers worked out by hand."""

import json
import math

import pytest
import torch

from riskpo.evaluate import EvalSettings, evaluate
from riskpo.records import Question
from riskpo.rewards import Scorer

SETTINGS = EvalSettings("tiny", "sums", temperature=1.0, max_response_tokens=8, seed=3)
QUESTIONS = [Question(f"q{i}", "?", "7", "arithmetic") for i in range(3)]
RIGHT = [0, 1, 4]  # of four samples each


def fake_sample(questions, samples):
    return [
        "7" if i < right else "8"
        for _, right in zip(questions, RIGHT, strict=True)
        for i in range(samples)
    ]


def run(**changes):
    options = {"samples": 4, "ks": (1, 2, 4), "settings": SETTINGS, **changes}
    with Scorer() as scorer:
        return evaluate(fake_sample, QUESTIONS, scorer.score, **options)


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
            lambda q, n: [""] * 400, questions, lambda t, q: (rewards, {}),
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
        lambda q, n: [""] * 4, QUESTIONS[:2], lambda t, q: (with_penalty, {}),
        samples=2, ks=(2,), settings=SETTINGS,
    )  # fmt: skip
    assert (result.avg.value, result.pass_at[2].value) == (-0.5, 0.5)


def test_result_is_written_with_its_settings(tmp_path):
    path = tmp_path / "deep" / "eval.json"
    run().write(path)
    run().write(path)
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
        evaluate(fake_sample, QUESTIONS[:1] * 2, None, samples=1, ks=(1,), settings=SETTINGS)
    with pytest.raises(ValueError, match="no id twice"):
        evaluate(fake_sample, [], None, samples=1, ks=(1,), settings=SETTINGS)
    with pytest.raises(ValueError, match="returned 1 texts; expected 3 questions x 4"):
        evaluate(lambda q, n: ["7"], QUESTIONS, None, samples=4, ks=(1,), settings=SETTINGS)

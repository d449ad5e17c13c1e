"""A reward is one finite number; anything else is a crash with a name, and nothing else stops."""

from __future__ import annotations

import logging

import pytest
import torch

from riskpo.rewards.scorer import Scorer, stop_if_all_crashed
from riskpo.rewards.verdict import crash_name
from riskpo.rewards.worker import to_verdict
from riskpo.rollout.generate import _Draw
from riskpo.rollout.sampler import SamplingLimits
from riskpo.types import Question
from tests.toy import scored
from tests.verifiers import odd_values

GOOD = {"tensor": 0.5, "numpy": 0.5, "bool": 1.0, "int": 2.0}
BAD = {
    "none": TypeError, "nan": ValueError, "inf": ValueError, "text": TypeError, "list": TypeError,
    "many": TypeError, "tensor of two": TypeError, "object": TypeError, "huge": ValueError,
    "complex": TypeError, "verdict": ValueError, "word": ValueError,
}  # fmt: skip


@pytest.mark.parametrize("what", [*GOOD, *BAD])
def test_one_finite_number_or_a_crash_with_a_name(what):
    if what in GOOD:
        assert to_verdict(odd_values(what, None)).reward == GOOD[what]
        return
    with pytest.raises(BAD[what]):
        to_verdict(odd_values(what, None))


def test_crashes_are_counted_by_name_told_once_and_all_of_them_stop(caplog):
    questions = [Question(str(i), "?", "1") for i in range(3)]
    with Scorer("tests.verifiers:picky", workers=1) as scorer:
        rewards, counts = scored(scorer, ["42", "x", "y"], questions)
        assert rewards == [1.0, 0.0, 0.0]
        assert (counts["crash"], counts["crash_KeyError"], counts["wrong"]) == (2, 2, 0)
        stop_if_all_crashed(counts, scorer)
        told = [r.message for r in caplog.records if r.levelno == logging.WARNING]
        assert len(told) == 1 and "KeyError: 'x'" in told[0] and "question '1'" in told[0]
        _, counts = scored(scorer, ["x", "y", "z"], questions)
        with pytest.raises(ValueError, match="all 3 verdicts of .*picky crashed: KeyError: 'x'"):
            stop_if_all_crashed(counts, scorer)
        stop_if_all_crashed({}, scorer)
    names = ["KeyError: 'x'", "verifier process was killed by signal 9, 2 times", ""]
    assert [crash_name(text) for text in names] == ["KeyError", "process", "process"]


def test_temperature_zero_takes_the_likeliest_token():
    scores = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 3.5]])
    draw = _Draw(SamplingLimits(1, 1, 0.0), torch.tensor([[0.999], [0.0]], dtype=torch.float64))
    assert draw(torch.zeros(2, 1), scores).argmax(-1).tolist() == [1, 2]
    expected = scores.log_softmax(-1)[[0, 1], [1, 2]]
    assert torch.equal(draw.columns[0], expected)

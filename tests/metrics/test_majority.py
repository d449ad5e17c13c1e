"""maj@k against every subset, one by one."""

from collections import Counter
from itertools import combinations

import pytest

from riskpo.metrics.evaluate import group_sizes, maj_at_k


def by_enumeration(right, wrong, silent, k):
    answers = ["right"] * right + [None] * silent
    for i, size in enumerate(wrong):
        answers += [f"wrong {i}"] * size
    chances = []
    for subset in combinations(answers, k):
        votes = Counter(a for a in subset if a is not None)
        best = max(votes.values(), default=0)
        leading = [a for a, n in votes.items() if n == best]
        chances.append(("right" in leading) / len(leading) if leading else 0.0)
    return sum(chances) / len(chances)


@pytest.mark.parametrize(
    "right, wrong, silent",
    [
        (3, [2, 2, 1], 1),
        (1, [1, 1, 1, 1], 2),
        (2, [5], 0),
        (4, [1, 3], 2),
        (0, [2, 1], 1),
        (5, [], 3),
        (6, [], 0),
        (2, [2, 2, 2], 0),
        (1, [3, 3], 3),
    ],
)
def test_every_subset(right, wrong, silent):
    n = right + sum(wrong) + silent
    for k in range(1, n + 1):
        expected = by_enumeration(right, wrong, silent, k)
        assert maj_at_k(right, wrong, silent, k) == pytest.approx(expected, abs=1e-12), k


def test_one_response_is_its_own_majority():
    assert maj_at_k(5, [20, 3], 4, 1) == pytest.approx(5 / 32)
    assert maj_at_k(20, [5] * 8, 4, 64) == 1.0 and maj_at_k(5, [20], 0, 25) == 0.0


def test_groups():
    votes = ["7", "7 ", "8", None, "9", "8", "x"]
    right = [True, True, False, False, False, False, False]
    assert group_sizes(votes, right) == (2, [1, 1, 2], 1)


def test_misuse_is_explained():
    for wrong_call in ((1, [1], 0, 3), (1, [1], 0, 0), (-1, [2], 0, 1), (1, [0], 1, 1)):
        with pytest.raises(ValueError, match="maj_at_k: got right="):
            maj_at_k(*wrong_call)

"""maj@k: the chance that a vote among k responses elects the right answer, exactly.

k of the n responses are drawn without replacement; each with an answer votes for it; the answer
with most votes wins, and leading answers that tie win with equal chances. As with pass@k the
expectation over all C(n, k) draws is computed, not sampled, so it is unbiased for n > k.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb


def group_sizes(votes: Sequence[str | None], right: Sequence[bool]) -> tuple[int, list[int], int]:
    """(right, one size per wrong answer, silent) of one question's responses.

    Right responses are one answer however they are written: the verifier says that they are equal.
    Wrong ones are told apart by their text, so that equal values written differently split their
    votes. None is a response without an answer; it does not vote.
    """
    wrong = Counter(v for v, ok in zip(votes, right, strict=True) if not ok and v is not None)
    silent = sum(v is None and not ok for v, ok in zip(votes, right, strict=True))
    return sum(right), sorted(wrong.values()), silent


def maj_at_k(right: int, wrong: Sequence[int], silent: int, k: int) -> float:
    """maj@k of one question from the sizes of its groups of equal answers.

    ValueError unless the sizes are at least 0 (wrong: 1) and 1 <= k <= n, their sum.
    """
    n = right + sum(wrong) + silent
    if min(right, silent, *(w - 1 for w in wrong)) < 0 or not 1 <= k <= n:
        raise ValueError(
            f"maj_at_k: got right={right}, wrong={list(wrong)}, silent={silent}, k={k}; expected "
            "counts and 1 <= k <= their sum. Draw at least k responses."
        )
    favourable = sum(
        comb(right, top) * _draws(wrong, silent, k - top, top)
        for top in range(1, min(right, k) + 1)
    )
    return favourable / comb(n, k)


def _draws(wrong: Sequence[int], silent: int, rest: int, top: int) -> float:
    """Draws of `rest` responses with no wrong answer above `top`, each over 1 + the ties at top.

    An answer with fewer than `top` responses can neither tie nor exceed: all of these are one pool
    with the silent ones.
    """
    pool = silent + sum(w for w in wrong if w < top)
    table = {(0, 0): 1}  # (drawn, tied) -> ways
    for size in (w for w in wrong if w >= top):
        longer: dict[tuple[int, int], int] = {}
        for (drawn, tied), ways in table.items():
            for taken in range(min(top, rest - drawn) + 1):
                key = drawn + taken, tied + (taken == top)
                longer[key] = longer.get(key, 0) + ways * comb(size, taken)
        table = longer
    return sum(
        ways * comb(pool, rest - drawn) / (1 + tied) for (drawn, tied), ways in table.items()
    )

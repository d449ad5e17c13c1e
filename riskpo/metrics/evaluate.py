"""avg@n, pass@k and maj@k of a policy on a set of questions. Q questions, n samples each.

    avg@n    mean reward over all Q * n responses
    pass@k   mean over questions of 1 - C(n - c, k) / C(n, k) with c right responses (reward above
             zero): the chance that k responses hold a right one, unbiased for n > k
    maj@k    mean over questions of the chance that a vote among k of the n responses elects the
             right answer, computed over all C(n, k) draws: unbiased for n > k

Intervals are 95 % percentile bootstraps over questions: how far a number would move on others of
the kind. With fewer than five questions right, or wrong, they are widened to Wilson's. `over_seeds`
adds Student's t over repetitions: how far a number moves with the sampling or the training. Numbers
compare only at equal decoding settings, so the result carries them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import comb
from typing import Any

import torch

from riskpo.metrics.intervals import Interval, near_the_ends, t_interval
from riskpo.rewards.verdict import Verdict, tally
from riskpo.types import Question
from riskpo_kernels import pass_at_k

Vote = Callable[[str, Question], str | None]  # a response's answer, None where it has none

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class EvalSettings:
    """Everything besides the weights that the numbers depend on."""

    model: str
    data: str
    temperature: float
    max_response_tokens: int
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` found.

    avg       mean reward, avg@samples, with its 95 % interval over questions
    pass_at   {k: pass@k with its interval}
    maj_at    {k: maj@k with its interval}; empty if responses have no answer to vote for
    counts    responses per outcome, and crashes by name (riskpo.rewards.verdict.tally)
    rewards   {question id: its `samples` rewards}, for tails and paired comparisons
    values    {"avg@8": one number per question, ...}, in the order of rewards: what is averaged
    texts     {question id: {"prompt", "gold", "responses"}}, in the order of rewards
    """

    avg: Interval
    pass_at: dict[int, Interval]
    maj_at: dict[int, Interval]
    samples: int
    questions: int
    counts: dict[str, int]
    rewards: dict[str, list[float]]
    values: dict[str, list[float]]
    settings: EvalSettings
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def estimates(self) -> dict[str, Interval]:
        """All of them by name: avg@n, then pass@k, then maj@k."""
        named = {f"avg@{self.samples}": self.avg}
        named |= {f"pass@{k}": estimate for k, estimate in self.pass_at.items()}
        return named | {f"maj@{k}": estimate for k, estimate in self.maj_at.items()}

    def row(self) -> dict[str, float]:
        """The headline numbers, for a log line: {"avg@8": ..., "pass@1": ...}."""
        return {name: estimate.value for name, estimate in self.estimates().items()}


def powers_of_two(samples: int) -> tuple[int, ...]:
    """The k of a pass@k curve: 1, 2, 4, ... up to `samples`, which is always the last."""
    return (*(2**i for i in range((samples - 1).bit_length())), samples)


def evaluate(
    texts: Sequence[str],
    questions: Sequence[Question],
    verdicts: Sequence[Verdict],
    *,
    samples: int,
    ks: Sequence[int],
    settings: EvalSettings,
    vote: Vote | None = None,
) -> EvalResult:
    """Summarise Q * n responses and their verdicts, question-major.

    ks        the k of pass@k and maj@k, each at most `samples`, which is n
    settings  carried into the result; its seed also seeds the bootstrap
    vote      (text, question) -> the answer that maj@k counts; without it there is no maj@k

    ValueError for no questions, repeated ids, a k out of range, or a wrong number of texts.
    """
    ids = [question.id for question in questions]
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(
            f"evaluate: got {len(ids)} questions with {len(set(ids))} different ids; expected at "
            "least one question and no id twice. Ask for more samples instead of repeating rows."
        )
    if samples < 1 or any(not 1 <= k <= samples for k in ks):
        raise ValueError(
            f"evaluate: got samples={samples}, ks={list(ks)}; expected 1 <= k <= samples. Draw "
            "more samples or ask for smaller k."
        )
    if len(texts) != len(ids) * samples:
        raise ValueError(
            f"evaluate: got {len(texts)} texts; expected {len(ids)} questions x {samples} samples "
            f"= {len(ids) * samples}. Give them question by question."
        )
    table = torch.tensor([v.reward for v in verdicts]).double().reshape(len(ids), samples)  # [Q, n]
    right = table > 0
    values = {f"avg@{samples}": table.mean(1)}
    values |= {f"pass@{k}": torch.as_tensor(pass_at_k(samples, right.sum(1), k)) for k in ks}
    if vote is not None:
        votes = [vote(text, questions[i // samples]) for i, text in enumerate(texts)]
        per_question = (votes[i : i + samples] for i in range(0, len(votes), samples))
        sizes = [group_sizes(*x) for x in zip(per_question, right.tolist(), strict=True)]
        found = {f"maj@{k}": [maj_at_k(*s, k) for s in sizes] for k in ks}
        values |= {name: torch.tensor(x, dtype=torch.float64) for name, x in found.items()}
    estimates = {name: _estimate(v, settings.seed) for name, v in values.items()}
    return EvalResult(
        avg=estimates[f"avg@{samples}"],
        pass_at={k: estimates[f"pass@{k}"] for k in ks},
        maj_at={k: estimates[f"maj@{k}"] for k in ks if f"maj@{k}" in estimates},
        samples=samples,
        questions=len(ids),
        counts=tally(verdicts),
        rewards=dict(zip(ids, table.tolist(), strict=True)),
        values={name: v.tolist() for name, v in values.items()},
        settings=settings,
        texts={
            q.id: {"prompt": q.prompt, "gold": q.gold, "responses": list(texts[i : i + samples])}
            for i, q in zip(range(0, len(texts), samples), questions, strict=True)
        },
    )


def over_seeds(results: Sequence[EvalResult]) -> dict[str, tuple[Interval, Interval]]:
    """{name: (interval over questions, interval over seeds)}; both are around the same mean.

    If the seeds share their questions, the bootstrap redraws means over the seeds, else the
    questions of all seeds.
    """
    shared = all(r.rewards.keys() == results[0].rewards.keys() for r in results)
    found = {}
    for name in results[0].values:
        each = torch.tensor([r.values[name] for r in results], dtype=torch.float64)  # [seeds, Q]
        drawn = each.mean(0) if shared else each.flatten()
        questions = _estimate(drawn, results[0].settings.seed)
        seeds = t_interval(each.mean(1).tolist())
        if seeds.n > 1 and seeds.low == seeds.high:  # seeds that agree at 0 or 1 are no certainty
            low, high = near_the_ends(seeds.value, seeds.low, seeds.high, drawn.tolist())
            seeds = replace(seeds, low=low, high=high)
        found[name] = questions, seeds
    return found


def _estimate(per_question: torch.Tensor, seed: int) -> Interval:
    """Mean of [Q] float64 values; questions are redrawn with replacement for the interval."""
    count, generator = len(per_question), torch.Generator().manual_seed(seed)
    draws = (torch.randint(count, (count,), generator=generator) for _ in range(RESAMPLES))
    drawn = torch.stack([per_question[draw].mean() for draw in draws])
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=drawn.dtype)).tolist()
    mean = per_question.mean().item()
    return Interval(mean, *near_the_ends(mean, low, high, per_question.tolist()), count)


def group_sizes(votes: Sequence[str | None], right: Sequence[bool]) -> tuple[int, list[int], int]:
    """(right, one size per wrong answer, silent) of one question's responses.

    Right responses are one answer, as the verifier finds them equal. Wrong ones are told apart by
    their text. None is a response without an answer; it does not vote.
    """
    wrong = Counter(v for v, ok in zip(votes, right, strict=True) if not ok and v is not None)
    silent = sum(v is None and not ok for v, ok in zip(votes, right, strict=True))
    return sum(right), sorted(wrong.values()), silent


def maj_at_k(right: int, wrong: Sequence[int], silent: int, k: int) -> float:
    """maj@k of one question from the sizes of its groups of equal answers.

    Each of the k with an answer votes for it; leading answers that tie win with equal chances.
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

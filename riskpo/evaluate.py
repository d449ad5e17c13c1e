"""avg@k and pass@k of a policy on a set of questions. Q questions, n samples each.

    avg@n    mean reward over all Q * n responses
    pass@k   mean over questions of 1 - C(n - c, k) / C(n, k), c of the n responses being right
             (reward above zero): the chance that k responses hold a right one, unbiased for n > k

The intervals are percentile bootstraps over questions: they say how far the numbers would move on
other questions of the kind, given these responses. Numbers are only comparable at equal decoding
settings, so the result carries them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from riskpo.records import Question
from riskpo_kernels import pass_at_k

Sampler = Callable[[Sequence[Question], int], Sequence[str]]
ScoreFunction = Callable[[Sequence[str], Sequence[Question]], tuple[torch.Tensor, dict[str, int]]]

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
class Estimate:
    """A mean over questions and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate` found.

    avg       mean reward, avg@samples
    pass_at   {k: Estimate}
    counts    responses per outcome: right, wrong, no_answer, unparsable_gold, timeout, crash
    rewards   {question id: its `samples` rewards}, for tails and paired comparisons
    """

    avg: Estimate
    pass_at: dict[int, Estimate]
    samples: int
    questions: int
    counts: dict[str, int]
    rewards: dict[str, list[float]]
    settings: EvalSettings

    def row(self) -> dict[str, float]:
        """The headline numbers, for a log line: {"avg@8": ..., "pass@1": ...}."""
        passes = {f"pass@{k}": estimate.value for k, estimate in self.pass_at.items()}
        return {f"avg@{self.samples}": self.avg.value, **passes}

    def write(self, path: str | Path) -> None:
        """As JSON, replaced in one step so that a reader never sees half a file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, path)


def powers_of_two(samples: int) -> tuple[int, ...]:
    """The k of a pass@k curve: 1, 2, 4, ... up to `samples`, which is always the last."""
    return (*(2**i for i in range((samples - 1).bit_length())), samples)


def evaluate(
    sample: Sampler,
    questions: Sequence[Question],
    score: ScoreFunction,
    *,
    samples: int,
    ks: Sequence[int],
    settings: EvalSettings,
) -> EvalResult:
    """Sample, score and summarise.

    sample    (questions, n) -> Q * n texts, question-major
    score     (texts, questions) -> (rewards [Q * n], counts), such as riskpo.rewards.Scorer.score
    samples   n, responses per question
    ks        the k of pass@k, each at most `samples`
    settings  carried into the result; its seed also seeds the bootstrap

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
    texts = sample(questions, samples)
    if len(texts) != len(ids) * samples:
        raise ValueError(
            f"evaluate: the sampler returned {len(texts)} texts; expected {len(ids)} questions x "
            f"{samples} samples = {len(ids) * samples}. Return them question by question."
        )
    rewards, counts = score(texts, questions)
    table = rewards.detach().double().cpu().reshape(len(ids), samples)  # [Q, n]
    right = (table > 0).sum(1)  # [Q]
    passes = {
        k: _estimate(torch.as_tensor(pass_at_k(samples, right, k)), settings.seed) for k in ks
    }
    return EvalResult(
        avg=_estimate(table.mean(1), settings.seed),
        pass_at=passes,
        samples=samples,
        questions=len(ids),
        counts=counts,
        rewards=dict(zip(ids, table.tolist(), strict=True)),
        settings=settings,
    )


def _estimate(per_question: torch.Tensor, seed: int) -> Estimate:
    """Mean of [Q] float64 values; questions are redrawn with replacement for the interval."""
    count = len(per_question)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack(
        [
            per_question[torch.randint(count, (count,), generator=generator)].mean()
            for _ in range(RESAMPLES)
        ]
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=drawn.dtype)).tolist()
    return Estimate(per_question.mean().item(), low, high)

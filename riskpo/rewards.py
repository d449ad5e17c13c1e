r"""Verifiable rewards, and a count of everything that is not a verdict.

Three kinds of reward:

  "math"             final answer equal to the gold, math-verify in killable processes; see
                     riskpo/math_reward.py for what counts as the answer and as equal
  "exact"            the response is the gold, character for character but for surrounding space;
                     nothing is parsed, so it runs here
  "package.module:function"
                     your own (text, question) -> float, called in the same killable processes;
                     question has the fields of riskpo.records.Question; above zero counts as right

"auto" takes "exact" for the embedded arithmetic task and "math" for everything else. Timeouts,
crashes and unreadable golds give reward 0 and are counted under their own names, never as wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch

from riskpo.records import Question
from riskpo.verdicts import Outcome, Verdict, failed, right
from riskpo.verifier_pool import VerifierPool

__all__ = ["Outcome", "Scorer", "Verdict", "VerifierPool", "check_golds", "verify_exact"]

MATH = "riskpo.math_reward:verify_math"
EXACT_SOURCES = ("arithmetic",)


def verify_exact(gold: str, answer: str) -> Verdict:
    """The trusted comparison: equal after stripping surrounding white space."""
    given = answer.strip()
    if not gold.strip():
        return failed(Outcome.UNPARSABLE_GOLD, "the gold is empty")
    if not given:
        return failed(Outcome.NO_ANSWER, "the response is empty")
    if given == gold.strip():
        return right(given)
    return failed(Outcome.WRONG, f"{given[:80]!r} is not {gold[:80]!r}")


class Scorer:
    """Rewards for the training loop and for evaluation; a context manager.

    reward      "auto", "math", "exact" or an import path "package.module:function"
    workers, seconds, memory_mib   see VerifierPool; the processes start when first needed

    ValueError for an unknown reward; RuntimeError when a reward function cannot be imported.
    """

    def __init__(
        self,
        reward: str = "auto",
        *,
        workers: int = 2,
        seconds: float = 5.0,
        memory_mib: int = 2048,
    ) -> None:
        if reward not in ("auto", "math", "exact") and ":" not in reward:
            raise ValueError(
                f"Scorer: got reward={reward!r}; expected 'auto', 'math', 'exact' or an import "
                "path 'package.module:function'. Check the spelling."
            )
        self.reward = reward
        self._options: dict[str, Any] = {
            "workers": workers,
            "seconds": seconds,
            "memory_mib": memory_mib,
        }
        self._pool: VerifierPool | None = None
        if ":" in reward:  # a misspelt import path is told now, not after the first rollouts
            self._running_pool()

    def score(
        self, texts: Sequence[str], questions: Sequence[Question]
    ) -> tuple[torch.Tensor, dict[str, int]]:
        """Rewards float32 [R] and how many of the R responses had which outcome.

        texts are R responses, question-major: with Q questions, rows i * R / Q .. belong to
        question i (R = Q is one response each). All six outcomes are in the counts, zeros too.
        """
        verdicts = self.verdicts(texts, questions)
        seen = Counter(v.outcome for v in verdicts)
        counts = {outcome.value: seen[outcome] for outcome in Outcome}
        return torch.tensor([v.reward for v in verdicts], dtype=torch.float32), counts

    def verdicts(self, texts: Sequence[str], questions: Sequence[Question]) -> list[Verdict]:
        """One Verdict per response, in order; rows as in `score`."""
        if (len(texts) % len(questions)) if questions else len(texts):
            raise ValueError(
                f"Scorer: got {len(texts)} texts for {len(questions)} questions; expected a "
                "multiple. Pass all responses of each question, question by question."
            )
        each = len(texts) // len(questions) if questions else 0
        rows = [question for question in questions for _ in range(each)]
        verdicts: list[Verdict | None] = [
            verify_exact(q.gold, t) if self._is_exact(q) else None
            for t, q in zip(texts, rows, strict=True)
        ]
        pending = [i for i, verdict in enumerate(verdicts) if verdict is None]
        if pending:
            items = [self._item(texts[i], rows[i]) for i in pending]
            for i, verdict in zip(pending, self._running_pool().run(items), strict=True):
                verdicts[i] = verdict
        return [v for v in verdicts if v is not None]

    def check_golds(self, questions: Sequence[Question]) -> list[tuple[Question, Verdict]]:
        """Questions whose gold does not verify against itself, with why; run before training.

        A reward function of your own is not asked: only it knows what a right response looks like.
        """
        if ":" in self.reward:
            return []
        exact = [(q, verify_exact(q.gold, q.gold)) for q in questions if self._is_exact(q)]
        parsed = [q for q in questions if not self._is_exact(q)]
        if parsed:
            verdicts = self._running_pool().run([(q.gold, None) for q in parsed])
            exact += zip(parsed, verdicts, strict=True)
        return [(q, verdict) for q, verdict in exact if verdict.outcome is not Outcome.RIGHT]

    def _is_exact(self, question: Question) -> bool:
        return self.reward == "exact" or (
            self.reward == "auto" and question.source in EXACT_SOURCES
        )

    def _item(self, text: str, question: Question) -> tuple[Any, ...]:
        return (text, asdict(question)) if ":" in self.reward else (question.gold, text)

    def _running_pool(self) -> VerifierPool:
        if self._pool is None:
            path = self.reward if ":" in self.reward else MATH
            self._pool = VerifierPool(path, **self._options)
        return self._pool

    def close(self) -> None:
        """End the verifier processes. Scoring again starts new ones."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def check_golds(
    questions: Sequence[Question],
    reward: str = "auto",
    *,
    workers: int = 2,
    seconds: float = 5.0,
) -> list[tuple[Question, Verdict]]:
    """`Scorer.check_golds` with processes of its own."""
    with Scorer(reward, workers=workers, seconds=seconds) as scorer:
        return scorer.check_golds(questions)

r"""Verifiable rewards: a score for each response, and counts of the outcomes.

Kinds of reward:

  "math"             final answer equal to the gold, math-verify in killable processes; see
                     riskpo/rewards/math.py for what counts as the answer and as equal
  "math-unevaluated" the same, and 1 + 5 is right for the gold 6: "math" counts such an answer as
                     `unevaluated`, without reward, since it may be a copy of the question
  "code"             the program in the response passes the tests of its question, in a sandbox; see
                     riskpo/rewards/code.py and docs/sandbox.md. "code-limits-only" accepts a
                     machine that allows no namespaces, and with it a program that can read your
                     files
  "exact"            the response equals the gold after surrounding space is stripped; this runs in
                     the calling process
  "package.module:function" or "file.py:function"
                     your own (text, question) -> float, called in the same killable processes;
                     question has the fields of riskpo.types.Question; above zero counts as right
                     and anything but one finite number is a crash. Modules are looked for in the
                     current folder too

"auto" takes "exact" for the embedded arithmetic task, "code" for programming tasks and "math" for
everything else. Timeouts, crashes and unreadable golds give reward 0 and are counted under their
own names, never as wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from riskpo.rewards.pool import VerifierPool
from riskpo.rewards.sandbox.run import require
from riskpo.rewards.verdict import OUTCOMES, Outcome, Verdict, crash_name, failed, right
from riskpo.types import Question

__all__ = ["Outcome", "Scorer", "Verdict", "VerifierPool", "verify_exact"]

MATH, CODE = "riskpo.rewards.math:verify_math", "riskpo.rewards.code:verify_code"
CODE_EXTRA_SECONDS = 30.0  # to start two sandboxes on a busy machine, beside the program's own time
EXACT_SOURCES = ("arithmetic",)


@dataclass(frozen=True)
class Kind:
    """A built-in reward: (text, question, seconds) -> what its function is called with.

    A text of None asks about the gold itself. sandbox: the level that it needs, "" for none.
    """

    function: str  # "module:function"
    arguments: Callable[[str | None, Question, float], tuple[Any, ...]]
    sandbox: str = ""


def plain(question: Question) -> dict[str, Any]:
    """A question as JSON; its pictures stay in the trainer."""
    return asdict(replace(question, images=()))


BUILT_IN = {
    "math": Kind(MATH, lambda text, q, _: (q.gold, text, True)),
    "math-unevaluated": Kind(MATH, lambda text, q, _: (q.gold, text, False)),
    "code": Kind(CODE, lambda text, q, s: (text, plain(q), s, "namespaces"), "namespaces"),
    "code-limits-only": Kind(CODE, lambda text, q, s: (text, plain(q), s, "limits"), "limits"),
}
MATH_KINDS = ("auto", "math", "math-unevaluated")  # which ask for a boxed answer


def _kind(name: str) -> Kind:
    return BUILT_IN.get(name) or Kind(name, lambda text, q, _: (text, plain(q)))


log = logging.getLogger("riskpo")


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

    reward      one of the kinds above
    workers, seconds   see VerifierPool; the processes start when first needed. For code, seconds is
                the time of a program over all its tests, without the sandbox's own

    ValueError for an unknown reward; RuntimeError when a reward function cannot be imported, or
    (SandboxUnavailable) when programs cannot be isolated on this machine.
    """

    def __init__(self, reward: str = "auto", *, workers: int = 2, seconds: float = 5.0) -> None:
        kinds = ("auto", "exact", *BUILT_IN)
        if reward not in kinds and ":" not in reward:
            raise ValueError(
                f"Scorer: got reward={reward!r}; expected one of {', '.join(kinds)} or an import "
                "path 'package.module:function'. Check the spelling."
            )
        self.reward = reward
        self.seconds = seconds
        self._workers = workers
        self._pools: dict[str, VerifierPool] = {}
        self.crashes: dict[str, str] = {}  # by exception: its text, and what it was raised over
        if ":" in reward or reward in BUILT_IN and BUILT_IN[reward].sandbox:
            self._pool(reward)  # told now, not after the first rollouts

    def verdicts(self, texts: Sequence[str], questions: Sequence[Question]) -> list[Verdict]:
        """One Verdict for each of R responses, in order.

        texts are question-major: with Q questions, texts i * R / Q .. belong to question i.
        """
        if (len(texts) % len(questions)) if questions else len(texts):
            raise ValueError(
                f"Scorer: got {len(texts)} texts for {len(questions)} questions; expected a "
                "multiple. Pass all responses of each question, question by question."
            )
        each = len(texts) // len(questions) if questions else 0
        rows = [question for question in questions for _ in range(each)]
        verdicts = self._judged(texts, rows)
        self._tell_crashes(texts, rows, verdicts)
        return verdicts

    def _judged(self, texts: Sequence[str | None], rows: Sequence[Question]) -> list[Verdict]:
        """A verdict for each row, in order; a text of None judges the gold."""
        found: dict[int, Verdict] = {}
        rows_of: dict[str, list[int]] = {}
        for i, question in enumerate(rows):
            rows_of.setdefault(self.kind_of(question), []).append(i)
        for kind, chosen in rows_of.items():
            pairs = [(texts[i], rows[i]) for i in chosen]
            if kind == "exact":
                judged = [verify_exact(q.gold, q.gold if t is None else t) for t, q in pairs]
            else:
                given = _kind(kind).arguments
                judged = self._pool(kind).run([given(t, q, self.seconds) for t, q in pairs])
            found.update(zip(chosen, judged, strict=True))
        return [found[i] for i in range(len(rows))]

    def _tell_crashes(
        self, texts: Sequence[str], rows: Sequence[Question], verdicts: Sequence[Verdict]
    ) -> None:
        """The text of an exception, once for each kind of it."""
        for text, question, verdict in zip(texts, rows, verdicts, strict=True):
            if verdict.outcome is not Outcome.CRASH:
                continue
            name = crash_name(verdict.detail)
            if name not in self.crashes:
                where = f"response {text[:60]!r} to question {question.id!r}"
                self.crashes[name] = f"{verdict.detail} ({where})"
                log.warning("reward %s crashed: %s", self.reward, self.crashes[name])

    def check_golds(self, questions: Sequence[Question]) -> list[tuple[Question, Verdict]]:
        """Questions whose gold does not verify against itself, with why; run before training.

        A reward function of your own is not asked: only it knows what a right response looks like.
        """
        if ":" in self.reward:
            return []
        judged = zip(questions, self._judged([None] * len(questions), questions), strict=True)
        return [(q, verdict) for q, verdict in judged if verdict.outcome is not Outcome.RIGHT]

    def kind_of(self, question: Question) -> str:
        """The reward of this question: what was asked for, or what "auto" takes."""
        if self.reward != "auto":
            return self.reward
        if question.source in EXACT_SOURCES:
            return "exact"
        # Never what else a row may name: data do not choose a weaker sandbox.
        return "code" if question.meta.get("reward") == "code" else "math"

    def _pool(self, kind: str) -> VerifierPool:
        if kind not in self._pools:
            own, seconds = _kind(kind), self.seconds
            if own.sandbox:
                require(own.sandbox)
                seconds += CODE_EXTRA_SECONDS
            self._pools[kind] = VerifierPool(own.function, workers=self._workers, seconds=seconds)
        return self._pools[kind]

    def close(self) -> None:
        """End the verifier processes. Scoring again starts new ones."""
        while self._pools:
            self._pools.popitem()[1].close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stop_if_all_crashed(counts: Mapping[str, int], scorer: Scorer) -> None:
    """ValueError where every verdict of a batch is a crash: a reward of 0 that means nothing."""
    every = sum(counts.get(outcome, 0) for outcome in OUTCOMES)
    if every and counts.get("crash", 0) == every:
        text = next(iter(scorer.crashes.values()), "see the warnings of the other processes")
        raise ValueError(
            f"reward: all {every} verdicts of {scorer.reward} crashed: {text}. Mend the reward; "
            "the same command goes on from the last checkpoint."
        )

"""What a verifier says about one answer. Standard library only: verifier processes import this."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from riskpo.types import Question

OUT_OF_MEMORY = 77  # exit status of a verifier process that could not allocate


class Outcome(str, Enum):
    """Why an answer got its reward. The last three say nothing about the answer itself."""

    RIGHT = "right"
    WRONG = "wrong"
    UNEVALUATED = "unevaluated"  # 1 + 5 for the gold 6: equal, but not worked out
    NO_ANSWER = "no_answer"  # the response holds nothing that could be compared
    UNPARSABLE_GOLD = "unparsable_gold"  # the reference answer could not be read
    TIMEOUT = "timeout"  # the verifier was killed at the wall-clock limit
    CRASH = "crash"  # the verifier raised, died or ran out of memory


OUTCOMES = tuple(outcome.value for outcome in Outcome)


@dataclass(frozen=True)
class Verdict:
    """reward is 1.0 for right unless a reward function says otherwise; detail is for logs."""

    reward: float
    outcome: Outcome
    detail: str = ""


# R responses of Q questions, question-major -> R verdicts
Judge = Callable[[Sequence[str], Sequence[Question]], list[Verdict]]


def right(detail: str = "") -> Verdict:
    return Verdict(1.0, Outcome.RIGHT, detail)


def failed(outcome: Outcome, detail: str = "") -> Verdict:
    """A verdict without reward."""
    return Verdict(0.0, outcome, detail)


def tally(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Counts of all seven outcomes, zeros included.

    Crashes are also counted by name: crash_KeyError, or crash_process if the process died.
    """
    counts = Counter(dict.fromkeys(OUTCOMES, 0))
    for verdict in verdicts:
        counts[verdict.outcome.value] += 1
        if verdict.outcome is Outcome.CRASH:
            counts[f"crash_{crash_name(verdict.detail)}"] += 1
    return dict(counts)


def crash_name(detail: str) -> str:
    """ "KeyError" of "KeyError: 'x'"; "process" where no exception is named."""
    name = detail.partition(":")[0]
    return name if name.isidentifier() else "process"


def metric_name(count: str) -> str:
    """The logged name of a count of `tally`. The outcome_* counts add up to all verdicts."""
    return f"outcome_{count}" if count in OUTCOMES else f"verifier_{count}"

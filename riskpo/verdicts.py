"""What a verifier says about one answer. Standard library only: verifier processes import this."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

OUT_OF_MEMORY = 77  # exit status of a verifier process that could not allocate


class Outcome(str, Enum):
    """Why an answer got its reward. The last three say nothing about the answer itself."""

    RIGHT = "right"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"  # the response holds nothing that could be compared
    UNPARSABLE_GOLD = "unparsable_gold"  # the reference answer could not be read
    TIMEOUT = "timeout"  # the verifier was killed at the wall-clock limit
    CRASH = "crash"  # the verifier raised, died or ran out of memory


@dataclass(frozen=True)
class Verdict:
    """reward is 1.0 for right unless a reward function says otherwise; detail is for logs."""

    reward: float
    outcome: Outcome
    detail: str = ""


def right(detail: str = "") -> Verdict:
    return Verdict(1.0, Outcome.RIGHT, detail)


def failed(outcome: Outcome, detail: str = "") -> Verdict:
    """A verdict without reward."""
    return Verdict(0.0, outcome, detail)

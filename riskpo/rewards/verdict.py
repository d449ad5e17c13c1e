"""What a verifier says about one answer. Standard library only: verifier processes import this."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

OUT_OF_MEMORY = 77  # exit status of a verifier process that could not allocate


class Outcome(str, Enum):
    """Why an answer got its reward. The last three say nothing about the answer itself."""

    RIGHT = "right"
    WRONG = "wrong"
    UNEVALUATED = "unevaluated"  # equal to a plain number, but only a sum that has it as its result
    NO_ANSWER = "no_answer"  # the response holds nothing that could be compared
    UNPARSABLE_GOLD = "unparsable_gold"  # the reference answer could not be read
    TIMEOUT = "timeout"  # the verifier was killed at the wall-clock limit
    CRASH = "crash"  # the verifier raised, died or ran out of memory


OUTCOMES = tuple(outcome.value for outcome in Outcome)
DENIED = (Outcome.WRONG, Outcome.NO_ANSWER)  # said of the answer; a lost exception may hide here


@dataclass(frozen=True)
class Verdict:
    """reward is 1.0 for right unless a reward function says otherwise; detail is for logs.

    watched    whether it was looked for exceptions that a library handled in silence behind this
               verdict: None where nobody was to look, False where it could not be done
    swallowed  what was found: ("TypeError in sympy_symbolic_eq", ...); see
    riskpo/rewards/swallowed.py
    """

    reward: float
    outcome: Outcome
    detail: str = ""
    watched: bool | None = None
    swallowed: tuple[str, ...] = ()


def right(detail: str = "") -> Verdict:
    return Verdict(1.0, Outcome.RIGHT, detail)


def failed(outcome: Outcome, detail: str = "") -> Verdict:
    """A verdict without reward."""
    return Verdict(0.0, outcome, detail)


def tally(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many verdicts had which outcome, all seven, and what the watch over the denied ones saw.

    watched, not_watched  verdicts of DENIED behind which it was looked, or should have been
    swallowed             watched ones during which at least one exception was swallowed
    swallowed_TypeError   of these, those with a TypeError; only the names that were seen
    crash_KeyError        crashes with a KeyError, or crash_process: the process died; as they occur
    """
    counts = Counter(dict.fromkeys((*OUTCOMES, "watched", "not_watched", "swallowed"), 0))
    for verdict in verdicts:
        counts[verdict.outcome.value] += 1
        if verdict.outcome is Outcome.CRASH:
            counts[f"crash_{crash_name(verdict.detail)}"] += 1
        if verdict.watched is not None:
            counts["watched" if verdict.watched else "not_watched"] += 1
        counts["swallowed"] += bool(verdict.swallowed)
        counts.update({f"swallowed_{entry.split()[0]}" for entry in verdict.swallowed})
    return dict(counts)


def crash_name(detail: str) -> str:
    """ "KeyError" of "KeyError: 'x'"; "process" where no exception is named."""
    name = detail.partition(":")[0]
    return name if name.isidentifier() else "process"


def metric_name(count: str) -> str:
    """The name under which a count of `tally` is logged; those of outcome_* add up to all."""
    return f"outcome_{count}" if count in OUTCOMES else f"verifier_{count}"

r"""What the \boxed{...} of a solution or of a response holds."""

from __future__ import annotations

import re

from riskpo.data.values import refuse

LONGEST_ANSWER = 1000  # characters
BOX = re.compile(r"\\boxed(?![A-Za-z])")
_BLANK = re.compile(r"\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are symbols, \\ a line break


def box_at(text: str, start: int) -> tuple[str, int]:
    r"""What follows \boxed and where it ends: the balanced group, or one token (\boxed 5).

    ("", 0) when the group never closes or is longer than an answer may be.
    """
    blank = _BLANK.match(text, start)
    start = blank.end() if blank else start
    if not text.startswith("{", start):
        token = re.split(r"[\s$]", text[start : start + LONGEST_ANSWER], maxsplit=1)[0]
        return token, start + len(token)
    depth = 0
    for brace in _BRACE.finditer(text, start, start + LONGEST_ANSWER + 2):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return text[start + 1 : brace.start()].strip(), brace.end()
    return "", 0


def last_boxed(solution: str) -> str:
    r"""The content of the last \boxed{...} of a worked solution; ValueError where there is none."""
    starts = [match.end() for match in BOX.finditer(solution)]
    content = box_at(solution, starts[-1])[0] if starts else ""
    if not content:
        came = f"a solution without a \\boxed answer: ...{solution[-80:]!r}"
        raise refuse(came, "one", "Add an answer column.")
    return content

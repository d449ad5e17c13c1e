r"""Answers that math-verify would compute or reorder though they are text: compared here.

series      2020-03-04, 3/4/2020, 10-12   part by part: dates, ranges, scores are no difference
words       red and blue                  a list in any order
compound    H2O                           letter by letter, with its digits in place
opposites   5% increase                   another answer than a 5% decrease, though both are 5%
names       x = 1, y = 2                  beside 1, 2: in the order of the names
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from riskpo.rewards.answers.writing import parts, without_text

_SERIES = re.compile(r"\A\d+(?:\\?%)?(?: *- *\d+(?:\\?%)?)+\Z|\A\d+(?: */ *\d+){2,}\Z")
_COMPOUND = re.compile(r"\A(?![A-Z]+_\{?\d\d\}?\Z)(?:[A-Z][a-z]?(?:_?\{?\d+\}?)?){2,}\Z")
_WORDS = re.compile(r"\A[A-Za-z]+(?:(?:, *| )[A-Za-z]+)*\Z")
_JOINT = re.compile(r" ?(?:, *(?:and|or)\b|,|;|\b(?:and|or)\b) ?")
_OPPOSITES = (
    "increas(?:e|ed|es|ing) decreas(?:e|ed|es|ing)", "more less|fewer", "above below",
    "left right", "up down", "gain|gained|profit loss|lost", "north south", "east west",
    "clockwise counter-?clockwise|anti-?clockwise", "ahead behind", "before after", "over under",
    "faster slower", "older younger", "taller shorter", "larger|bigger|greater smaller",
    "upward|upwards downward|downwards", "forward|forwards backward|backwards", "heads tails",
    "AD|CE BC|BCE", "ago later", "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April June July August September October November December",
)  # fmt: skip
_SIDES = [
    [
        re.compile(rf"(?<![\\A-Za-z-])(?:{side})(?![A-Za-z])", re.IGNORECASE)
        for side in sides.split()
    ]
    for sides in _OPPOSITES
]
_NAMED = re.compile(r"\A\$?(\\?[A-Za-z]+(?:_\{?\w+\}?)?) *=([^=]+)\Z")
_ARTICLE = re.compile(r"\A(?:an?|the) +(?=[A-Za-z]{2})", re.IGNORECASE)


def compare_texts(gold: str, answer: str) -> bool | None:
    """Whether two answers are the same, where the gold is one of these; None where it is none."""
    gold, answer = (without_text(text).strip() for text in (gold, answer))
    if _opposed(gold, answer):
        return False
    if _SERIES.match(gold):
        return _series(gold) == _series(answer)
    if _COMPOUND.match(gold) and re.search(r"\d", gold):
        return _bare(gold) == _bare(answer)
    golds, answers = word_list(gold), word_list(answer)
    if golds and answers:
        return golds == answers
    return None


def in_order(gold: str, answer: str) -> tuple[str, str]:
    """Values of different names as a tuple, where the other answer has none (x = 1, y = 2 beside
    1, 2). Both as they are where there is nothing to order."""
    g_named, a_named = _named(gold), _named(answer)
    if g_named and not a_named and "=" not in answer:
        members = parts(_inside(answer))
        if len(members) == len(g_named):
            return _tuple(g_named.values()), _tuple(members)
    if a_named and not g_named and "=" not in gold and _inside(gold) != gold:
        return gold, _tuple(a_named[name] for name in sorted(a_named))
    return gold, answer


def _named(text: str) -> dict[str, str]:
    """Values by name, where all of two or more members have a name of their own."""
    text = re.sub(r"\\(?:text|mathrm|mbox) *\{ *and *\}|\band\b", ",", text)
    found = [_NAMED.match(part) for part in parts(text) if part]
    named = {match[1]: match[2].strip() for match in found if match}
    return named if len(named) == len(found) > 1 else {}


def _inside(text: str) -> str:
    text = text.strip().strip("$").replace("\\left", "").replace("\\right", "")
    return text[1:-1] if text[:1] == "(" and text[-1:] == ")" else text


def _tuple(members: Iterable[str]) -> str:
    return f"({', '.join(members)})"


def _opposed(gold: str, answer: str) -> bool:
    """Whether both say one or more of a line of _OPPOSITES, and none of them both do."""
    for sides in _SIDES:
        first, second = ({side for side in sides if side.search(text)} for text in (gold, answer))
        if first and second and not first & second:
            return True
    return False


def _series(text: str) -> list[int] | None:
    match = _SERIES.match(text)
    return [int(part) for part in re.findall(r"\d+", text)] if match else None


def _bare(text: str) -> str:
    return re.sub(r"[_{}\s$]", "", text)


def word_list(text: str) -> list[str] | None:
    """The sorted members of a list in words, and "or" where that joins them; None for all else."""
    if not _WORDS.match(text) or not re.search(r"\b(?:and|or)\b|,", text):
        return None
    members = [without_article(member) for member in _JOINT.split(text)]
    found = sorted(m if len(m) == 1 else m.casefold() for m in members if m)
    return [*found, "or"] if re.search(r"\bor\b", text) else found


def without_article(text: str) -> str:
    return _ARTICLE.sub("", text.strip())

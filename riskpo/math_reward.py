r"""Is the final answer of a response equal to the reference answer? Runs in verifier processes.

Which part of a response is its answer, first rule that finds something (text before the last
</think> is dropped):

  1. the last \boxed{...}. Only the last: two boxes would otherwise become the set of both. A base
     model that runs on into a question of its own is graded on what it boxed there, hence mostly
     wrong: stopping is part of the task. An empty, unclosed or endless last box is `no_answer`.
  2. the last "#### x" line (GSM8K).
  3. the last "answer": "x" of a JSON object; no JSON parser: models write LaTeX into it.
  4. the last "Answer: x", "A: x" or "the answer is x".
  5. what math-verify finds in the last paragraph (1,000 characters at most), as a rule its last
     number or formula. No more than that: further back it is a guess at some step of the way.

Equality is math-verify's, gold first, with set-relation comparison, so that 1 <= x < 2 is [1,2).
Never the other way round as well: verify is asymmetric on purpose, and with the answer in the
gold's place "25" would be right for x^2+y^2=25 and {1,3} for (3,1). Policies, all lenient about
writing and strict about value: thousands separators 1,234  1{,}234  1\,234  "1 234" are dropped;
$ and units are dropped; 25\% is equal to 25 and to 0.25; a comma list is a set, in any order; x=5
is 5. Golds that are a choice ("A", "(B)") or words ("yes", "\text{even}") are compared as text.
Nothing here has a time limit: the pool kills.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from riskpo.verdicts import Outcome, Verdict, failed, right

TAIL_CHARACTERS = 1000
LONGEST_ANSWER = 1000

_LATEX = LatexExtractionConfig(boxed_match_priority=0)
_EXPR = ExprExtractionConfig()
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_JSON = re.compile(r'"answer"\s*:\s*(?:"((?:[^"\\\n]|\\.)*)"|(-?[\d.,]+))', re.IGNORECASE)
_MARKED = re.compile(
    r"(?:\banswer(?:\s+is)?[*\s]*:|\banswer\s+is\b|^[*\s]*A:)[*\s]*(\S[^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,! ]|\{,\}|,\\!|~| )(?=\d{3}(?!\d))")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z\\])(-?\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![A-Za-z\d])")
_FUNCTION = re.compile(  # "\sin^2 t": math-verify would drop the t as a unit, tonnes
    r"(\\(?:sin|cos|tan|cot|sec|csc|log|ln)(?:\^(?:\d|\{[^{}]*\}))?) *([A-Za-z])(?![A-Za-z])"
)
_WITH_UNIT = re.compile(r"^(\\?\$?-?[\d,]*\.?\d+)\s+([A-Za-z][A-Za-z .]+)$")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|rm|bf)\s*\{([^{}]*)\}")
_WORD = re.compile(r"(?<![\\A-Za-z{=^_])[A-Za-z][a-z]{2,}(?=[\s,.;:!?]|$)")
_CHOICE = re.compile(r"^(?:\(([A-J])\)|([A-J]))$")
_CHOSEN = re.compile(r"^(?:\(([A-J])\).*|([A-J])(?:[.:)].*)?)$", re.IGNORECASE | re.DOTALL)
_NOT_UNITS = ("pi", "million", "billion", "thousand", "hundred", "dozen", "percent", "or", "and")


def verify_math(gold: str, answer: str | None) -> Verdict:
    """Compare the final answer of the response `answer` with the reference `gold`, both text.

    Without an answer the gold is compared with itself: anything but `right` makes it a bad gold.
    """
    if answer is None:
        return _check_gold(gold)
    found, marked = extract(answer)
    choice = _CHOICE.match(_plain(gold))
    if choice:
        chosen = _CHOSEN.match(_plain(found if marked else answer.strip()))
        if chosen is None:
            return failed(Outcome.NO_ANSWER, f"no choice in {found[-80:]!r}")
        return _judge((choice[1] or choice[2]) == (chosen[1] or chosen[2]).upper(), gold, found)
    golds = parsed_gold(gold)
    if not golds:
        return failed(Outcome.UNPARSABLE_GOLD, f"gold {gold[:80]!r}")
    if marked and _letters(found) == _letters(final(gold)) != "":
        return right(found[:80])
    answers = parse_answer(found, marked)
    found = next((a for a in answers if isinstance(a, str)), found)
    if not _expressions(answers) and not (answers and _is_words(final(gold))):
        return failed(Outcome.NO_ANSWER, f"nothing to compare in {found[-80:]!r}")
    if _any_equal(golds, answers):
        return right(found[:80])
    if not _expressions(list(golds)):
        return failed(Outcome.UNPARSABLE_GOLD, f"gold {gold[:80]!r} is not an expression")
    return _judge(False, gold, found)


def _check_gold(gold: str) -> Verdict:
    if _CHOICE.match(_plain(gold)) or _is_words(final(gold)):
        return right("text")
    golds = _expressions(list(parsed_gold(gold)))
    if not golds:
        return failed(Outcome.UNPARSABLE_GOLD, f"gold {gold[-80:]!r} cannot be read")
    probe = _parse_boxed("1234567")  # some golds equal themselves at sight and hang on all else
    for g in golds:
        _equal(g, probe[0])
    if not any(_equal(g, g) for g in golds):
        return failed(Outcome.UNPARSABLE_GOLD, f"gold {gold[-80:]!r} does not equal itself")
    return right()


def extract(response: str) -> tuple[str, bool]:
    """The final answer of a response, and whether it was marked as such (rules 1 to 4)."""
    text = response.rpartition("</think>")[2]
    for command in ("\\boxed", "\\fbox"):
        start = text.rfind(command)
        if start >= 0:
            return _braced(text[start + len(command) :]), True
    for pattern in (_HASHES, _JSON, _MARKED):
        matches = list(pattern.finditer(text))
        if matches:
            return next(g for g in matches[-1].groups() if g is not None).strip(), True
    return text[-TAIL_CHARACTERS:].rstrip().rpartition("\n\n")[2].strip(), False


def _braced(text: str) -> str:
    """What follows \\boxed: the balanced group, or one token; empty when it never closes."""
    text = text.lstrip()
    if not text.startswith("{"):  # \boxed 5
        return re.split(r"[\s$]", text, maxsplit=1)[0]
    depth = 0
    for i, character in enumerate(text[: LONGEST_ANSWER + 2]):
        if text[i - 1 : i] == "\\":  # \{ and \} are symbols
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:i].strip()
    return ""


def final(gold: str) -> str:
    """The answer inside a gold that may be a whole worked solution."""
    found, marked = extract(gold)
    return found if marked else gold.strip()


@lru_cache(maxsize=4096)
def parsed_gold(gold: str) -> tuple[Any, ...]:
    """A gold as math-verify's values; empty where nothing can be read from it.

    Prose is no gold: math-verify would read "think it over" as a product of letters.
    """
    text = final(gold)
    if _is_prose(text) and not _is_words(text):
        return ()
    try:
        return tuple(_parse_boxed(text))
    except (MemoryError, RecursionError):
        raise
    except Exception:  # whatever the parser stumbled over, the gold cannot be read
        return ()


def parse_answer(found: str, marked: bool) -> list[Any]:
    """An extracted answer as math-verify's values."""
    if not found or (marked and len(found) > LONGEST_ANSWER):
        return []
    if not marked:
        return _parse(found, _LATEX, _EXPR)
    sentence = _sentence(found)
    if not _is_prose(sentence):
        return _parse_boxed(sentence)
    return _parse(f"answer: {sentence}", _LATEX, _EXPR)


def _parse_boxed(text: str) -> list[Any]:
    return _parse(f"\\boxed{{{_tidy(text)}}}", _LATEX) if text else []


def _tidy(text: str) -> str:
    """One formula in the form math-verify reads best; see the policies above."""
    text = _sentence(text)
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", _THOUSANDS.sub("", text))
    text = _FUNCTION.sub(r"\1(\2)", text)
    with_unit = _WITH_UNIT.match(text)
    if with_unit and not set(with_unit[2].lower().split()) & set(_NOT_UNITS):
        return with_unit[1]
    return text


def _sentence(text: str) -> str:
    """Up to the end of the sentence, without emphasis, dollar signs or a full stop around it."""
    text = re.split(r"\.\s+(?=[A-Z])", text.strip(), maxsplit=1)[0]
    text = text.replace("\\\\(", "\\(").strip().strip("*").strip().rstrip(".").strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inside = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and opening not in inside:
            return inside.strip()
    return text


def _plain(text: str) -> str:
    """Text without markup, for choices and words."""
    return _TEXT.sub(r"\1", _sentence(text)).strip(" .$*\\~")


def _letters(text: str) -> str:
    return "".join(_plain(text).casefold().split())


def _is_words(text: str) -> bool:
    """A name or a word or two; a whole sentence is no answer."""
    return bool(re.fullmatch(r"[A-Za-z][A-Za-z.'-]+(?: [A-Za-z.'-]+){0,3}", _plain(text)))


def _is_prose(text: str) -> bool:
    """Two or more English words outside \\text, so that only a part of it can be the answer."""
    return len(_WORD.findall(_TEXT.sub("", text))) > 1


def _expressions(values: list[Any]) -> list[Any]:
    return [v for v in values if not isinstance(v, str)]


def _any_equal(golds: Sequence[Any], answers: Sequence[Any]) -> bool:
    """Whether one of the pairs is equal. When none is and a comparison raised, that is raised: an
    answer that could not be compared is a crash with a name, not a wrong answer."""
    problem: Exception | None = None
    for gold, answer in product(golds, answers):
        try:
            if _equal(gold, answer):
                return True
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            problem = error
    if problem is not None:
        raise problem
    return False


def _equal(gold: Any, answer: Any) -> bool:
    return bool(
        verify(
            gold,
            answer,
            timeout_seconds=None,
            raise_on_error=True,
            allow_set_relation_comp=True,
        )
    )


def _parse(text: str, *configs: Any) -> list[Any]:
    return list(parse(text, configs, parsing_timeout=None, raise_on_error=True))


def _judge(equal: bool, gold: str, found: str) -> Verdict:
    if equal:
        return right(found[:80])
    return failed(Outcome.WRONG, f"{found[:80]!r} is not {gold[:80]!r}")

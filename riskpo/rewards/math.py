r"""Is the final answer of a response equal to the reference answer? Runs in verifier processes.

In riskpo/rewards/answers/:

  final.py    finds the answer in a response
  writing.py  brings its notation into one form
  forms.py    compares what is not a formula: clock, ratio, base, words, plain numbers
  values.py   decides when two values are equal

The rest is math-verify's, with set-relation comparison, so that 1 <= x < 2 is [1,2). The gold is
always its first argument: verify is asymmetric, and the other way round "25" would be right for
x^2+y^2=25 and {1,3} for (3,1). Golds that are a choice ("A", "(B)") are compared as text. The
policy is lenient about notation and strict about value; docs/verifier.md has the table. There is no
time limit here: the pool kills late workers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
from sympy import FiniteSet, Intersection, Union

from riskpo.data.boxes import LONGEST_ANSWER
from riskpo.rewards.answers.echo import is_plain, is_worked_out
from riskpo.rewards.answers.final import boxes, extract, final
from riskpo.rewards.answers.forms import compare, form_in, special
from riskpo.rewards.answers.texts import in_order
from riskpo.rewards.answers.values import equal
from riskpo.rewards.answers.writing import depths, numbers, parts, sentence, tidy, without_text
from riskpo.rewards.verdict import Outcome, Verdict, failed, right

__all__ = ["extract", "final", "parse_answer", "parsed_gold", "verify_math"]

_LATEX = LatexExtractionConfig(boxed_match_priority=0)
_EXPR = ExprExtractionConfig()
_WORD = re.compile(r"(?<![\\A-Za-z{=^_])[A-Za-z][a-z]{2,}(?=[\s,.;:!?]|$)")
_CASELESS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|\\[A-Za-z]+")
_PRIMES = re.compile(r"[A-Za-z]'+")
_BASE = re.compile(r"(?<=\d)_(?:\{(\w+)\}|(?=\w))(\w?)")
_TEXTS = re.compile(r"\\(?:text|textrm|mathrm|mbox) *\{[^{}]*\}")
_CHOICE = re.compile(r"^(?:\(([A-J])\)|([A-J]))$")
_CHOSEN = re.compile(r"^(?:\(([A-J])\).*|([A-J])(?:[.:)].*)?)$", re.IGNORECASE | re.DOTALL)
_RELATION = re.compile(r"[<>]|\\(?:l|g|n)eq?(?![a-z])|\\(?:l|g)(?:t|eqslant)(?![a-z])")
_JUNCTION = re.compile(
    r"\\(?:text|mathrm|mbox) *\{ *(or|and) *\}|\\(lor|vee|land|wedge)(?![a-z])|\b(or|and)\b"
)
_COMMAND = re.compile(r"\\(?:begin|end) *\{[a-z]+\}|\\[A-Za-z]+")
_SHORT = 80  # characters of an unmarked line that is all answer
_DEEPEST = 40  # brackets within brackets; math-verify's parser takes seconds over hundreds
_MOST_RELATIONS = 8  # of one answer


def verify_math(gold: str, answer: str | None, worked_out: bool = True) -> Verdict:
    """Compare the final answer of the response `answer` with the reference `gold`, both text.

    Without an answer the gold is compared with itself: anything but `right` makes it a bad gold.
    worked_out: where the gold is a plain number, 1 + 5 for 6 is `unevaluated` instead of right.
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
    verdict = _compare(gold, found, marked)
    several = boxes(answer) if verdict.outcome is Outcome.WRONG else []
    if len(several) > 1 and len(several) == len(parts(tidy(final(gold)))):
        verdict, found = _compare(gold, ", ".join(several), True), ", ".join(several)
    if verdict.outcome is Outcome.RIGHT and worked_out and is_plain(final(gold)):
        if not is_worked_out(final(gold), verdict.detail):
            return failed(Outcome.UNEVALUATED, f"{verdict.detail!r} is not worked out")
    return verdict


def _compare(gold: str, found: str, marked: bool) -> Verdict:
    """The verdict on one extracted answer; its detail is the answer where that is right."""
    reference = final(gold)
    formed = special(reference)
    whole = marked or _is_whole(found) and (formed or re.search(r"[\d\\]", found) is not None)
    if whole and found and _letters(found) == _letters(reference) != "":
        return right(found[:LONGEST_ANSWER])
    if formed and (not whole or _is_prose(found)):
        found = form_in(found, reference) or found
    if len(found) <= LONGEST_ANSWER and (whole or formed):
        verdict = compare(reference, found, _same_formulas)
        if verdict is not None:
            return _judge(verdict, gold, found)
        if _another_case(reference, found):
            return _judge(False, gold, found)
        gold, found = in_order(reference, found)
    golds = parsed_gold(gold)
    if not golds:
        return failed(Outcome.UNPARSABLE_GOLD, f"gold {gold[:80]!r}")
    answers = parse_answer(found, whole)
    found = next((a for a in answers if isinstance(a, str)), found)
    if not _expressions(answers) and not (answers and _is_words(reference)):
        return failed(Outcome.NO_ANSWER, f"nothing to compare in {found[-80:]!r}")
    if _any_equal(golds, answers):
        return right(found)
    if not _expressions(list(golds)):
        return failed(Outcome.UNPARSABLE_GOLD, f"gold {gold[:80]!r} is not an expression")
    return _judge(False, gold, found)


def _same_formulas(first: str, second: str) -> bool:
    """Of two parts of an answer; words are none."""
    if _is_prose(first + second) or any(_is_words(text) for text in (first, second)):
        return False
    return _any_equal(_expressions(_parse_boxed(first)), _expressions(_parse_boxed(second)))


def _another_case(gold: str, answer: str) -> bool:
    """Whether a letter of one, behind the last equality sign, is in the other as its capital alone,
    or has another number of primes, or digits another base: math-verify reads none of the three."""
    sides = [_TEXTS.sub("", x).rpartition("=")[2] for x in (gold, answer)]
    primes = [sorted(_PRIMES.findall(x.replace("^{\\prime}", "'"))) for x in sides]
    bases = [set(_BASE.findall(x)) for x in sides]
    first, second = (set(_LETTER.findall(x)) for x in sides)
    if primes[0] != primes[1] or all(bases) and bases[0] != bases[1]:
        return True
    others = {x[:2].swapcase() + x[2:] for x in first - second}  # m of M, and \omega of \Omega
    return bool(others & (second - first))


def _check_gold(gold: str) -> Verdict:
    reference = final(gold)
    if _CHOICE.match(_plain(gold)) or _is_words(reference):
        return right("text")
    if compare(reference, reference, _same_formulas):
        return right("text")
    golds = _expressions(list(parsed_gold(gold)))
    if not golds:
        return failed(Outcome.UNPARSABLE_GOLD, f"gold {gold[-80:]!r} cannot be read")
    probe = _parse_boxed("1234567")  # some golds equal themselves at sight and hang on all else
    for g in golds:
        equal(g, probe[0])
    if not any(equal(g, g) for g in golds):
        return failed(Outcome.UNPARSABLE_GOLD, f"gold {gold[-80:]!r} does not equal itself")
    return right()


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
    text = sentence(found) if marked else found
    if not text or len(text) > LONGEST_ANSWER:
        return []
    if max(depths(text)) > _DEEPEST:
        return []
    if not marked:
        return _parse(numbers(found), _LATEX, _EXPR)
    if not _is_prose(text):
        return _parse_boxed(text)
    return _parse(f"answer: {numbers(text)}", _LATEX, _EXPR)


def _parse_boxed(text: str) -> list[Any]:
    """One formula as values; \\pm and inequalities with "or" are read here, not by math-verify."""
    text = tidy(text)
    if "\\pm" in text or "\\mp" in text:
        members = [_formula(sign) for part in parts(text) for sign in _both_signs(part)]
        if all(members):
            return [FiniteSet(*(member[0] for member in members)), text]
    if _RELATION.search(text) and _JUNCTION.search(text):
        joined = _junction(text)
        if joined is not None:
            return [joined, text]
    return _formula(text)


def _formula(text: str) -> list[Any]:
    return _parse(f"\\boxed{{{text}}}", _LATEX) if text else []


def _both_signs(text: str) -> list[str]:
    r"""x = a \pm b as a + b and a - b; with two \pm, and no \mp, all four."""
    text = text.rpartition("=")[2]
    if "\\mp" not in text and text.count("\\pm") == 2:
        first, second, third = text.split("\\pm")
        return [f"{first}{s}{second}{t}{third}" for s in "+-" for t in "+-"]
    signs = (("+", "-"), ("-", "+"))
    both = (text.replace("\\pm", upper).replace("\\mp", lower) for upper, lower in signs)
    return list(dict.fromkeys(both))  # one where there is no sign to choose


def _junction(text: str) -> Any:
    """Inequalities with "or" or "and" between them as one set; None for anything else."""
    relations = [piece.strip(" ,~\\") for piece in _JUNCTION.split(text)[:: _JUNCTION.groups + 1]]
    words = (next(filter(None, match.groups())) for match in _JUNCTION.finditer(text))
    joints = {"and" if word in ("and", "land", "wedge") else "or" for word in words}
    if len(joints) != 1 or len(relations) > _MOST_RELATIONS:
        return None
    if not all(_RELATION.search(relation) for relation in relations):
        return None
    values = [_expressions(_formula(relation)) for relation in relations]
    if not all(v and hasattr(v[0], "as_set") and len(v[0].free_symbols) == 1 for v in values):
        return None
    if len(set().union(*(v[0].free_symbols for v in values))) != 1:
        return None
    sets = [v[0].as_set() for v in values]
    return Union(*sets) if joints == {"or"} else Intersection(*sets)


def _plain(text: str) -> str:
    """Text without markup, for choices and words."""
    return without_text(sentence(text)).strip(" .$*~").rstrip("\\ ")


def _letters(text: str) -> str:
    """Text without its blanks, but for those between digits: 1 2 is not 12. Words of three letters
    are written in any case, and names of variables are not."""
    plain = _CASELESS.sub(lambda match: match[0].casefold(), " ".join(_plain(text).split()))
    return re.sub(r"(?<!\d)\s|\s(?!\d)", "", plain)


def _is_whole(found: str) -> bool:
    """Whether an unmarked last line is all answer."""
    if len(found) > _SHORT or "\n" in found:
        return False
    talk = re.sub(r"\b(?:or|and)\b", "", _COMMAND.sub("", without_text(found)))
    return " " not in found or not re.search(r"[A-Za-z]{4}|[a-z]{2} [a-z]", talk)


def _is_words(text: str) -> bool:
    """A name or a word or two; a whole sentence is no answer."""
    return bool(re.fullmatch(r"[A-Za-z][A-Za-z.'-]+(?: [A-Za-z.'-]+){0,3}", _plain(text)))


def _is_prose(text: str) -> bool:
    """Two or more English words outside \\text, so that only a part of it can be the answer."""
    return len(_WORD.findall(without_text(text))) > 1


def _expressions(values: list[Any]) -> list[Any]:
    return [v for v in values if not isinstance(v, str)]


def _any_equal(golds: Sequence[Any], answers: Sequence[Any]) -> bool:
    """Whether one of the pairs is equal. When none is and a comparison raised, that is raised: an
    answer that could not be compared is a crash with a name, not a wrong answer."""
    problem: Exception | None = None
    for gold, answer in product(golds, answers):
        if isinstance(gold, str) != isinstance(answer, str):
            continue
        try:
            if equal(gold, answer):
                return True
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            problem = error
    if problem is not None:
        raise problem
    return False


def _parse(text: str, *configs: Any) -> list[Any]:
    return list(parse(text, configs, parsing_timeout=None, raise_on_error=True))


def _judge(verdict: bool, gold: str, found: str) -> Verdict:
    if verdict:
        return right(found)
    return failed(Outcome.WRONG, f"{found[:80]!r} is not {gold[:80]!r}")

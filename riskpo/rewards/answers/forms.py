r"""Answers that are not formulas, and numbers written out: compared here, before math-verify.

math-verify reads everything as arithmetic: 4:30 as a quotient, "1 2" as a sum, cat as c * a * t,
1101_2 as 1101. `compare` knows these forms by their writing and compares them as what they are:

  clock       4:30, 4:30 PM, 16:30          part by part; 12 hours with AM or PM are 24 hours
  ratio       1:2:3, 3 to 2                 part by part, in order
  numeral     1101_2, 1F_{16}, 12 (base 5)  digits and base
  sequence    1 2, 3 5/2                    numbers with blanks between them, one by one
  words       cat, red, blue                letter by letter; a list in any order
  number      -1,234.50, 3/4, 25\%, 1e-30   exactly, as a fraction

Everything else is None: a formula.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from riskpo.rewards.answers.texts import compare_texts, without_article
from riskpo.rewards.answers.writing import (
    BLANK,
    MIXED,
    depths,
    mixed,
    parts,
    sentence,
    tidy,
    without_text,
)

Same = Callable[[str, str], bool]  # of two formulas
LARGEST_EXPONENT = 10_000  # of ten, in a number that is written out

_PERCENT = r"(?:\\?%|\\?%? *percent(?:age)?\b| *pct\b)"
_NUMBER = re.compile(
    rf"\A([+-]?) *(?:\\[dtc]?frac *\{{ *(-?\d+) *\}} *\{{ *(-?\d+) *\}}|(\d+) */ *(\d+)"
    rf"|([1-9]\d{{0,2}}(?:,\d{{3}})+(?!\d)|\d*)(?:\.(\d*))?)"
    rf"(?: *\\times *10\^ *\{{? *([+-]?\d+) *\}}?)? *({_PERCENT})?"
)
_CLOCK = re.compile(r"\A(\d{1,2}):(\d{2})(?::(\d{2}))?\s*(?:([ap])\.?\s*m\b\.?)?", re.IGNORECASE)
_COLON = re.compile(r"(?:\\mathbin\{:\}|\{:\}|\\colon|:|(?<=[\w})]) +to +(?=[\w\\({]))")
_IN_TEXT = re.compile(
    r"(?<![\d.])\d+(?:\.\d+)?(?: ?: ?\d+(?:\.\d+)?)+(?:\s*[ap]\.?m\b\.?)?|\b(?:noon|midnight)\b"
    r"|(?<![\d.:])\d{1,2} ?[ap]\.?m\b",
    re.IGNORECASE,
)
_NUMERAL = re.compile(
    r"\A(-? *)\(?([0-9A-Za-z]+(?:\.[0-9A-Za-z]+)?)\)?(?:_ *\{? *\(?(?:base *)?([0-9]+|[a-z]+)\)?\}?"
    r"|\s*\(?(?:in )?base *([0-9]+|[a-z]+)\)?)",
    re.IGNORECASE,
)
_NUMERAL_IN_TEXT = re.compile(r"(?<![0-9A-Za-z])-?[0-9A-Za-z]+_(?:\{[^{}]*\}|\d+)")
_BASES = "two three four five six seven eight nine ten eleven twelve".split()
_TOKEN = r"-?(?:\d+(?:\.\d+)?|\.\d+)(?:/\d+)?"
_SEQUENCE = re.compile(rf"\A{_TOKEN}(?:{BLANK}+{_TOKEN})+")
_BLANKS = re.compile(rf"{BLANK}+")
_LETTERS = re.compile(r"\A[A-Za-z]+(?: [A-Za-z]+){0,3}")
_MATHS = re.compile(
    r"pi|infinity|inf|i|e|(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|arc[a-z]+)[a-z]?"
)
_NAMES = re.compile(r"\\(angle|triangle|odot|parallel|perp)(?![A-Za-z]) *")
_PRODUCT = re.compile(r"[xyz]+")  # letters that stand for numbers, so that xy is yx
_UNIT = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?-?\d\}?)?$")
_TIMES = "s|sec|seconds?|min|minutes?|h|hrs?|hours?|days?|weeks?|months?|years?"
_MEASURE = (
    rf"(?:{_TIMES}|[mck]?m|[km]?g|in|ft|feet|foot|mi|miles?|yd|lbs?|m?[lL]|gal|gallons?|k?N|k?J|k?W"
    r"|k?Pa|V|K|mol|meters?|metres?)(?:\^\{?-?\d\}?)?"
)
_RATE = re.compile(  # 6 m/s, 6 \frac{m}{s}, \$5/hour; x/y is no unit
    rf"(?<=[\d.}}])(?:{BLANK}*{_MEASURE}(?:(?: |\\cdot *){_MEASURE})* */ *{_MEASURE}"
    rf"|{BLANK}*\\[dt]?frac *\{{ *{_MEASURE} *\}} *\{{ *{_MEASURE} *\}}"
    rf"|{BLANK}*/ *(?:{_TIMES.replace('s|', '', 1).replace('|h|', '|')}|miles?|gallons?|person))$"
)
_AND = re.compile(r"(?<=\d) *\band\b *(?=\\[dtc]?frac|\d+ */ *\d+$)")  # 2 and 1/3
_HOUR = re.compile(r"\A(\d{1,2}) *([ap])\.? *m\b\.?\Z", re.IGNORECASE)
_MIDDLE = re.compile(r"\A(?:12(?::00)? *)?(noon|midnight)\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Number:
    """A number that is written out. kind is integer, decimal, fraction or scientific."""

    value: Fraction
    percent: bool
    kind: str


def number(text: str) -> Number | None:
    """The number that a tidy text is; None for a formula, and for an exponent out of reach."""
    text = without_text(_UNIT.sub("", text)).strip().strip("$").strip()
    text = MIXED.sub(mixed, _AND.sub(" ", _RATE.sub("", text)))
    match = _NUMBER.fullmatch(text)
    if not match:
        return None
    sign, top, bottom, over, under, whole, decimals, exponent, percent = match.groups()
    top, bottom = (top, bottom) if top else (over, under)
    if top:
        if int(bottom) == 0:
            return None
        value, kind = Fraction(int(top), int(bottom)), "fraction"
    elif whole or decimals:
        digits = (whole or "").replace(",", "")
        value = Fraction(int(f"0{digits}{decimals or ''}"), 10 ** len(decimals or ""))
        kind = "integer" if value.denominator == 1 else "decimal"
    else:
        return None
    if exponent:
        if len(exponent) > 6 or abs(int(exponent)) > LARGEST_EXPONENT:
            return None
        value, kind = value * Fraction(10) ** int(exponent), "scientific"
    return Number(-value if sign == "-" else value, bool(percent), kind)


def same_number(a: Number, b: Number) -> bool:
    """Exact; a percentage is equal to its number and to its hundredth."""
    if a.percent == b.percent:
        return a.value == b.value
    percentage, plain = (a, b) if a.percent else (b, a)
    return plain.value in (percentage.value, percentage.value / 100)


def compare(gold: str, answer: str, same: Same) -> bool | None:
    """Whether two final answers are the same, where one of them has a form of its own.

    None where both are formulas. `same` says of two formulas, parts of a ratio, if they are equal.
    """
    verdict = compare_texts(sentence(gold), sentence(answer))
    if verdict is not None:
        return verdict
    gold, answer = tidy(gold), tidy(answer)
    if _is_set(gold) and _is_tuple(answer) or _is_tuple(gold) and _is_set(answer):
        return False
    golds, answers = parts(gold), parts(answer)
    if len(golds) == len(answers) == 1:
        return _compare_one(golds[0], answers[0], same)
    twice = len(golds) == len(answers) and not _is_set(gold) and len({*golds}) < len(golds)
    if not twice and not any(_special(part) for part in (*golds, *answers)):
        return None
    left = list(answers)
    for part in golds:
        found = next((a for a in left if _equal_part(part, a, same, twice)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


def _equal_part(gold: str, answer: str, same: Same, formulas: bool) -> bool:
    """Of members of a list; of formulas, `same` says where they are all there is (1, 1, 2)."""
    verdict = _compare_one(gold, answer, same)
    if verdict is None and formulas:
        verdict = same(gold, answer)
    return bool(verdict) or gold == answer


def special(text: str) -> bool:
    """Whether one of these forms, and no formula or number, is in a final answer."""
    return any(_special(part) for part in parts(tidy(text)))


def _special(part: str) -> bool:
    return any(read(part) is not None for read in (_colon, _numeral, _sequence, words))


def form_in(prose: str, gold: str) -> str | None:
    """The last clock, ratio or numeral in a sentence, where the gold is one."""
    pattern = _IN_TEXT if _colon(gold) else _NUMERAL_IN_TEXT if _numeral(gold) else None
    found = [match[0] for match in pattern.finditer(prose)] if pattern else []
    return found[-1] if found else None


def _compare_one(gold: str, answer: str, same: Same) -> bool | None:
    g, a = number(gold), number(answer)
    if g and a:
        return same_number(g, a)
    verdict = _compare_colons(gold, answer, same)
    if verdict is None:
        verdict = _compare_numerals(gold, answer)
    if verdict is not None:
        return verdict
    g_sequence, a_sequence = _sequence(gold), _sequence(answer)
    if g_sequence or a_sequence:
        return g_sequence == a_sequence
    g_words = words(gold)
    if g_words is not None:
        return g_words == _joined(without_article(_side(answer)))
    return None


def _compare_colons(gold: str, answer: str, same: Same) -> bool | None:
    g, a = _colon(gold), _colon(answer)
    if g is None and a is None:
        return None
    if g is not None and a is not None:
        if _clock(gold) is not None and _clock(answer) is not None:
            return _same_clock(gold, answer)
        return len(g) == len(a) and all(_same_part(x, y, same) for x, y in zip(g, a, strict=True))
    hour = next(filter(None, map(_HOUR.match, map(without_text, (gold, answer)))), None)
    if hour:  # 3 PM is 3
        return number(hour[1]) == number(answer if g is not None else gold)
    ratio, clock, text = (g, gold, answer) if g is not None else (a or [], answer, gold)
    other = number(text)
    if _clock(clock) or len(ratio) != 2 or other and other.kind == "integer":
        return False
    values = [number(part) for part in ratio]
    if other is None or None in values:
        return same(rf"\frac{{{ratio[0]}}}{{{ratio[1]}}}", text)
    first, second = (v.value for v in values if v)
    return bool(second) and first / second == other.value


def _same_part(a: str, b: str, same: Same) -> bool:
    x, y = number(a), number(b)
    return x.value == y.value if x and y else "".join(a.split()) == "".join(b.split()) or same(a, b)


def _is_set(text: str) -> bool:
    r"""\{1, 2\}, of two members or more; \{(1, 2)\} has one."""
    return text.startswith("\\{") and text.endswith("\\}") and len(parts(text)) > 1


def _is_tuple(text: str) -> bool:
    """(1, 2) or an interval. (1,2),(3,4) is none: without its ends a bracket closes unopened."""
    text = text.replace("\\left", "").replace("\\right", "")
    inside = text[1:-1]
    if text[:1] not in ("(", "[") or text[-1:] not in (")", "]") or len(parts(inside)) < 2:
        return False
    return min(depths(inside, "([", ")]"), default=0) >= 0


def _colon(text: str) -> list[str] | None:
    """The parts of a ratio or a time; None where the colon is of a set, a map or a sentence."""
    text = _spelled_time(_side(text))
    if not (":" in text or " to " in text or "\\colon" in text):
        return None
    text = without_text(text).replace("$", "")
    if re.search(r"\\\{|[|<>=]|\\to\b|\\(?:mid|l?eq?|geq?)\b", text):
        return None
    text = re.sub(r"\s*\b[ap]\.?\s*m\b\.?\s*$", "", text, flags=re.IGNORECASE)
    found = [part.strip() for part in _COLON.split(text)]
    prose = any(re.search(r"[A-Za-z]{3,} [A-Za-z]{2,}", part) for part in found)
    return found if len(found) > 1 and all(found) and not prose else None


def _clock(text: str) -> tuple[int, int, int, str] | None:
    match = _CLOCK.fullmatch(_spelled_time(_side(text)).replace("~", " ").strip())
    if not match:
        return None
    hour, minute, second = (int(match[i] or 0) for i in (1, 2, 3))
    return (hour, minute, second, (match[4] or "").lower()) if max(minute, second) < 60 else None


def _spelled_time(text: str) -> str:
    """noon and 3 PM with their minutes."""
    text = without_text(text).strip()
    middle, hour = _MIDDLE.match(text), _HOUR.match(text)
    if middle:
        return "12:00 PM" if middle[1].lower() == "noon" else "12:00 AM"
    return f"{hour[1]}:00 {hour[2]}m" if hour else text


def _same_clock(gold: str, answer: str) -> bool:
    g, a = _clock(gold), _clock(answer)
    if g is None or a is None or g[1:3] != a[1:3]:
        return False
    if bool(g[3]) == bool(a[3]):
        return (g[0], g[3]) == (a[0], a[3])
    named, bare = (g, a) if g[3] else (a, g)
    return bare[0] in (named[0], named[0] % 12 + 12 * (named[3] == "p"))


def _shorn(digits: str) -> str:
    return digits.lstrip("0") or "0"


def _numeral(text: str) -> tuple[str, str] | None:
    match = _NUMERAL.fullmatch(without_text(_side(text)).replace("$", "").strip())
    if not match:
        return None
    digits, name = match[2].lower(), (match[3] or match[4]).lower()
    base = int(name) if name.isdigit() else _BASES.index(name) + 2 if name in _BASES else 0
    bare = digits.replace(".", "")
    if not bare.isdigit():
        if base < 11 or len(digits) < 2 or not all(int(c, 36) < base for c in bare):
            return None
    elif len(name) == 1 and name.isalpha():  # 49_m: of a base m, and of no other
        return match[1].strip() + _shorn(digits), name
    if not 2 <= base <= 36:
        return None
    return match[1].strip() + _shorn(digits), str(base)


def _compare_numerals(gold: str, answer: str) -> bool | None:
    g, a = _numeral(gold), _numeral(answer)
    if g is None and a is None:
        return None
    if g is not None:
        bare = _shorn(_side(answer).replace(" ", "").lower())
        return g == a or a is None and bare == g[0]
    plain = number(gold)
    return a is not None and plain is not None and a == (str(plain.value), "10")


def _sequence(text: str) -> list[str] | None:
    text = without_text(_side(text)).strip()
    return _BLANKS.split(text) if _SEQUENCE.fullmatch(text) else None


def words(text: str) -> str | None:
    """The letters of a word or two; None for anything that may be a formula."""
    plain = re.sub(r"[\s~]+", " ", without_text(text).replace("\\ ", " ")).strip(" .$*")
    plain = without_article(_NAMES.sub(r"\1 ", plain.rstrip("\\")))
    if len(plain) < 2 or not _LETTERS.fullmatch(plain):
        return None
    if any(_MATHS.fullmatch(word.lower()) for word in plain.split() if len(word) > 1):
        return None
    joined = _joined(plain)
    return None if _PRODUCT.fullmatch(joined) else joined


def _joined(text: str) -> str:
    plain = re.sub(r"\\(?:cdot|times|ast|,|;|:|!| )", "", without_text(text))
    return re.sub(r"[\s~*$\\]+", "", plain).strip(".").casefold()


def _side(text: str) -> str:
    """What stands behind the last equality sign."""
    return re.split(r"(?<![<>!\\])=", text)[-1].strip()

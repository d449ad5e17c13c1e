r"""Is an answer worked out? If the gold is a plain number, the answer has to be one too.

To the question "1 + 5" the answer 1+5 equals the gold 6, but copies the question; rewarding it
teaches a policy to echo. A gold that is a plain number, or a list of them, therefore asks for an
answer in plain numbers.
"""

from __future__ import annotations

import re
from fractions import Fraction

from riskpo.rewards.answers.forms import number
from riskpo.rewards.answers.writing import parts, tidy, without_text

_BIG, _SMALL = 10**6, Fraction(1, 1000)  # beyond, a number may be written as a power of ten
_POWER = re.compile(r"(?<=[\d.]) *\\times *10\^\{-?\d+\}")
_TEN = re.compile(r"10\^\{-?\d+\}")
_E_NOTATION = re.compile(r"[\d.][eE][+-]?\d")
_OPERATIONS = (
    "sqrt|[dt]?binom|choose|log|ln|lg|exp|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|sum|prod|int|lim"
    "|lfloor|lceil|lvert|gcd|lcm|max|min|[bp]?mod|div|times|cdot|ast|det|[dtc]?frac"
)
_WORKED = re.compile(  # a sign between two operands, a factorial, a product of brackets, a function
    r"-[- ]{0,9}[-(]|(?<![A-Za-z\\])[A-Za-z] *(?:\^ *\{? *\d|[-+] *[A-Za-z\d(\\])"
    r"|\\begin(?![A-Za-z])|([A-Za-z]) */ *\1(?![A-Za-z])"
    r"|[\d.)}%] *(?:[-+*/] *[-+({\\ ]*[\d.]|\^ *[{(]* *[-\d\\]|!|\( *-?[\d\\])|\) *\(|\|"
    rf"|\\(?:{_OPERATIONS})(?![A-Za-z])|\b(?:{_OPERATIONS}|plus|minus)\b"
)
_SIDE = re.compile(r"(?<![<>!\\])=|\\approx|\\equiv|\\sim(?![a-z])")
_FRACTION = re.compile(
    r"-?\\[dtc]?frac *\{ *-?\d+ *\} *\{ *-?\d+ *\}|(?<![\d)}/])-?\d+ */ *\d+(?! */)"
)


def is_plain(gold: str) -> bool:
    """Whether a gold is a number, or a list of numbers, that is written out."""
    return all(number(part) is not None for part in _members(tidy(gold)))


def is_worked_out(gold: str, answer: str) -> bool:
    """Whether an answer that is equal to the plain gold is written out as well."""
    golds = [number(part) for part in _members(tidy(gold))]
    whole = all(g is not None and g.value.denominator == 1 and not g.percent for g in golds)
    far = _E_NOTATION.search(answer) is not None or any(
        g is not None and (abs(g.value) >= _BIG or abs(g.value) < _SMALL or g.kind == "scientific")
        for g in golds
    )
    return all(_written_out(part, whole, far) for part in _members(tidy(answer)))


def _members(text: str) -> list[str]:
    """The numbers of a list; x = 5 and 1 + 4 = 5 count by what stands last."""
    for command in ("\\{", "\\}", "\\left", "\\right"):
        text = text.replace(command, " ")
    inside = text.strip()
    if inside[:1] in ("(", "[") and inside[-1:] in (")", "]"):
        inside = inside[1:-1]
    found = [part for part in parts(inside) if part] or [text]
    return [re.sub(r"^ *(?:\\pm|\\text *\{ *(?:and|or) *\}|and\b|or\b)", "", _SIDE.split(part)[-1])
            for piece in found for part in re.split(r"\b(?:and|or)\b", piece)]  # fmt: skip


def _written_out(text: str, whole: bool, far: bool) -> bool:
    text = without_text(text).strip()
    given = number(text)
    if given is not None and given.kind != "fraction":
        return given.kind != "scientific" or far or _POWER.search(text) is None
    if not whole:
        text = _FRACTION.sub("1", text)
    elif _FRACTION.search(text):
        return False
    if far:
        text = _TEN.sub("1", _POWER.sub("", text))
    return _WORKED.search(text) is None

r"""One way of writing for what models write in many: characters, numbers and units of an answer.

Only writing changes here, never a value: the square root sign becomes \sqrt, 1{,}234 becomes 1234,
3 1/2 becomes \frac{7}{2}, 0.(3) becomes \frac{1}{3}, 1e3 becomes 1 \times 10^{3}. All patterns are
linear; those of `tidy` see one answer, those of `ascii_writing` a whole response.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache, partial
from itertools import accumulate

_SIGNS = {
    "\u00d7": "\\times ", "\u22c5": "\\cdot ", "\u00b7": "\\cdot ", "\u2219": "\\cdot ",
    "\u00f7": "\\div ", "\u00b1": "\\pm ", "\u2213": "\\mp ",
    "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-",
    "\u2264": "\\le ", "\u2265": "\\ge ", "\u2a7d": "\\le ", "\u2a7e": "\\ge ",
    "\u2260": "\\neq ", "\u221e": "\\infty ", "\u222a": "\\cup ", "\u2229": "\\cap ",
    "\u2208": "\\in ", "\u2205": "\\emptyset ", "\u2227": "\\land ", "\u2228": "\\lor ",
    "\u00b0": "^{\\circ}", "\u00ba": "^{\\circ}", "\u2103": "^{\\circ}C", "\u2109": "^{\\circ}F",
    "\u2044": "/", "\u2215": "/", "\u2236": ":", "\u3001": ",", "\u3002": ".", "\u2026": "...",
    "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u066b": ".", "\u066c": ",",
}  # fmt: skip
_KEPT = {"\u25c1", "\u25b7"}
_BEYOND = re.compile(r"[^\x00-\x7f]")
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074-\u207b\u207d-\u207f\u2071"
_LOWERED = "\u2080-\u208b\u208d\u208e"
_RUNS = (("^", re.compile(f"[{_RAISED}]+")), ("_", re.compile(f"[{_LOWERED}]+")))
_ROOTS = {"\u221a": "\\sqrt", "\u221b": "\\sqrt[3]", "\u221c": "\\sqrt[4]"}
_ROOT = re.compile("[\u221a\u221b\u221c]")
_UNDER_ROOT = re.compile(r"\A *(\d+(?:\.\d+)?|[A-Za-z]|\\[A-Za-z]+)")
_BAR = re.compile("((?:\\d[\u0304\u0305])+)")

BLANK = r"(?: |~|\\[ ,;:!]|\\q?quad\b)"
_GROUP = r"(?:\\[,! ]|\{,\}|,\\!|~| )\d{3}"
_THOUSANDS = re.compile(rf"(?<![\d.])\d{{1,3}}(?:{_GROUP})+(?!\d)")
_BARE_FRACTION = re.compile(r"\\([dtc]?)frac *(\d) *(\d)")
MIXED = re.compile(
    rf"(?<![\d.^_A-Za-z/])(\d{{1,3}}(?:,\d{{3}})+|\d+)(?:{BLANK}*\\[dtc]?frac *"
    rf"\{{ *(\d+) *\}} *\{{ *(\d+) *\}}|{BLANK}+(\d+)/(\d+)(?![\d/.]))"
)
_REPEATING = re.compile(
    r"(?<![\d.])(\d*)\.(\d*)(?:\\(?:overline|bar) *(?:\{ *(\d+) *\}|(\d))|\((\d+)\)"
    r"|\\dot *\{?(\d)\}?(?:(\d*)\\dot *\{?(\d)\}?)?)(?:\.\.\.|\\[lc]?dots)?"
)
_GOES_ON = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?:\.\.\.|\\[lc]?dots)")
_POWER_OF_TEN = re.compile(r"(?<=\d) *(?:[xX*]|\\ast|\\cdot|\\times) *10 *(?:\^|\*\*) *")
_EXPONENT = re.compile(r"(\^|\*\*) *(-?\d+)")
_SCIENTIFIC = re.compile(
    r"(?<![A-Za-z\\\d.])(-?(?:\d+(?:\.\d*)?|\.\d+))[eE]([+-]?\d+)(?![A-Za-z\d])"
)
_FUNCTION = re.compile(  # "\sin^2 t": math-verify would drop the t as a unit, tonnes
    r"(\\(?:sin|cos|tan|cot|sec|csc|log|ln)(?:\^(?:\d|\{[^{}]*\}))?) *([A-Za-z])(?![A-Za-z])"
)
_CURRENCY = re.compile(
    r"(?:\b(?:US|A|C|HK|NT|R))?\\?\$|\\(?:euro|pounds|yen|texteuro|textdollar|textsterling)\b(?:\{\})?"
    r"|\b(?:USD|EUR|GBP|JPY|CNY|RMB|INR|AUD|CAD|CHF)\b"
)
_DEGREE = re.compile(
    r"(?:\^ *(?:\{ *\\circ *\}|\\circ)|\\degree) *(?:\\?[A-Za-z]*\{[CF]\}|[CF]\b)?"
)

_ANGLE = re.compile(rf"(?<![\d.])(\d+(?:\.\d+)?) *{_DEGREE.pattern}")
_WITH_UNIT = re.compile(r"^(-?(?:[\d,]*\d(?:\.\d+)?|\.\d+))\s+([A-Za-z][A-Za-z .]+|L)$")
_BEFORE_UNIT = re.compile(rf"(?<=[\d}}]){BLANK}+(?=\\(?:text|textrm|mathrm|mbox) *\{{)")
_SENTENCE = re.compile(r"\.\s+(?=[A-Z])")
_MULTIPLES: dict[str, Fraction | int] = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "dozen": 12, "basis point": Fraction(1, 10**4), "basis points": Fraction(1, 10**4),
}  # fmt: skip
_MULTIPLE = re.compile(  # 5 million, 2.5\text{ million dollars}
    rf"(?<![\d.])(\d+(?:,\d{{3}})*(?:\.\d+)?){BLANK}*"
    rf"(?:(\\(?:text|textrm|mathrm|mbox) *\{{){BLANK}*)?"
    rf"({'|'.join(sorted(_MULTIPLES, reverse=True))})(?![A-Za-z])"
)
_ABOUT = re.compile(r"\A(?:\\approx|\\sim(?![a-z])|~(?=[\d ]))\s*(?=[-\d\\])")
_DOTS = re.compile(r"(?<=\d)\.\.\.$")  # 0.333...
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|rm|bf)\s*\{([^{}]*)\}")
NOT_UNITS = {
    *("pi", "million", "billion", "thousand", "hundred", "dozen", "percent", "or", "and"),
    *("base", "to", "am", "pm", "a.m.", "p.m.", "a.m", "p.m", "noon", "midnight"),
}


def ascii_writing(text: str) -> str:
    """Digits, commas, colons, minus signs and symbols of any script as ASCII and LaTeX."""
    if text.isascii():
        return text
    for mark, run in _RUNS:
        text = run.sub(partial(_script, mark), text)
    text = _BAR.sub(lambda m: f"\\overline{{{re.sub(r'[^0-9]', '', m[1])}}}", text)
    return _BEYOND.sub(lambda match: _character(match[0]), text)


def _script(mark: str, match: re.Match[str]) -> str:
    return f"{mark}{{{unicodedata.normalize('NFKC', match[0])}}}".replace("\u2212", "-")


@lru_cache(maxsize=4096)
def _character(c: str) -> str:
    if c in _SIGNS or c in _KEPT or c in _ROOTS:
        return _SIGNS.get(c, c)
    kind, plain = unicodedata.category(c), unicodedata.normalize("NFKC", c)
    if kind == "Nd":
        return str(unicodedata.decimal(c))
    if kind in ("Sc", "Cf", "Zs"):
        return {"Sc": "\\$", "Cf": "", "Zs": " "}[kind]
    if "\u2044" in plain:  # one half and its like
        return "\\frac{{{}}}{{{}}}".format(*plain.split("\u2044"))
    name = unicodedata.name(plain[0], "")
    if len(plain) == 1 and name.startswith("GREEK SMALL LETTER ") and name.count(" ") == 3:
        return f"\\{name.split()[-1].lower()} "
    return plain if plain.isascii() else c


def sentence(text: str) -> str:
    """Up to the end of the sentence, without emphasis, dollar signs or a full stop around it."""
    text = _SENTENCE.split(text.strip(), maxsplit=1)[0]
    text = text.replace("\\\\(", "\\(").strip().strip("*").strip()
    text = text if _DOTS.search(text) else text.rstrip(".").strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inside = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and opening not in inside:
            return inside.strip()
    return text


def without_text(text: str) -> str:
    r"""The words of \text{words} and its like, in their place."""
    return _TEXT.sub(r"\1", text)


def tidy(text: str) -> str:
    """One formula in the form that math-verify and riskpo/rewards/answers/forms.py read."""
    text = _ABOUT.sub("", sentence(text)).replace("\\varnothing", "\\emptyset")
    text = _BEFORE_UNIT.sub("", numbers(text))
    text = _FUNCTION.sub(r"\1(\2)", text)
    if re.search(r"\d", text):
        if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
            text = _ANGLE.sub(r"(\\frac{\1 \\pi}{180})", text)
        text = _DEGREE.sub("", text)
        text = _CURRENCY.sub("", text).strip()
    with_unit = _WITH_UNIT.match(text)
    if with_unit and not NOT_UNITS & set(with_unit[2].lower().split()):
        return with_unit[1]
    return text


def depths(text: str, opening: str = "([{", closing: str = ")]}") -> list[int]:
    """How many brackets are open after each character; below 0 where one closes unopened."""
    return list(accumulate((c in opening) - (c in closing) for c in text))


def parts(text: str) -> list[str]:
    """The members of a list: split at the commas and semicolons outside all brackets."""
    text = re.sub(r"^\\\{(.*)\\\}$", r"\1", text.strip(), flags=re.DOTALL)
    found, start = [], 0
    for i, (c, depth) in enumerate(zip(text, depths(text), strict=True)):
        grouped = text[i - 1 : i].isdigit() and re.match(r"\d{3}(?!\d)", text[i + 1 : i + 5])
        if c in ",;" and depth <= 0 and not (c == "," and grouped):
            found.append(text[start:i].strip())
            start = i + 1
    return [*found, text[start:].strip()]


def numbers(text: str) -> str:
    """The numbers in a text in one way of writing; the rest of it as it is."""
    if any(root in text for root in _ROOTS):
        text = _roots(text)
    text = _MULTIPLE.sub(_multiple, text)
    text = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = _REPEATING.sub(_repeating, text)
    text = _GOES_ON.sub(_going_on, text)
    text = _BARE_FRACTION.sub(r"\\\1frac{\2}{\3}", text)
    text = MIXED.sub(mixed, text)
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
    return _EXPONENT.sub(r"^{\2}", _POWER_OF_TEN.sub(r" \\times 10^", text))


def _multiple(match: re.Match[str]) -> str:
    value = Fraction(match[1].replace(",", "")) * _MULTIPLES[match[3]]
    whole = value.denominator == 1
    text = str(value.numerator) if whole else f"{Decimal(value.numerator) / value.denominator:f}"
    return text + (match[2] or "")


def _roots(text: str) -> str:
    """Root signs with what stands under them: a bracket, a number, a letter."""
    while roots := list(_ROOT.finditer(text)):
        at = roots[-1].start()  # inner roots first
        head, command, rest = text[:at], _ROOTS[text[at]], text[at + 1 :]
        under = _UNDER_ROOT.match(rest)
        bracket = depths(rest, "({", ")}") if rest.startswith(("(", "{")) else []
        end = bracket.index(0) + 1 if 0 in bracket else 0
        if end:
            text = f"{head}{command}{{{rest[1 : end - 1]}}}{rest[end:]}"
        elif under:
            text = f"{head}{command}{{{under[1]}}}{rest[under.end() :]}"
        else:
            text = f"{head}{command}{rest}"
    return text


def _fraction(whole: str, head: str, period: str) -> str:
    """0.1(6) from "0", "1" and "6"."""
    before = int(f"0{whole}{head}")
    top = int(f"0{whole}{head}{period}") - before
    value = Fraction(top, 10 ** len(head) * (10 ** len(period) - 1))
    if value.denominator == 1:
        return str(value.numerator)
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _repeating(match: re.Match[str]) -> str:
    whole, head, over, digit, bracket, first, middle, last = match.groups(default="")
    return _fraction(whole, head, over or digit or bracket or first + middle + last)


def _going_on(match: re.Match[str]) -> str:
    """0.333... is a third: a period that is seen three times (twice from six digits on)."""
    digits = match[2]
    for length in range(1, len(digits) // 2 + 1):
        times = 2 if length >= 6 else 3
        period = digits[-length:]
        if digits.endswith(period * times):
            head = digits
            while head.endswith(period):
                head = head[:-length]
            return _fraction(match[1], head, period)
    return match[0]


def mixed(match: re.Match[str]) -> str:
    whole, top, bottom = (int(g.replace(",", "")) for g in match.groups() if g is not None)
    if top >= bottom:
        return match[0]
    return f"\\frac{{{whole * bottom + top}}}{{{bottom}}}"

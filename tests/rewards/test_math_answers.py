"""Which answers are equal: the cases of each kind, and many more that are drawn."""

import random
from fractions import Fraction

import pytest

from riskpo.rewards.math import verify_math
from tests.rewards.answer_tables import FORMS, LENIENT, TEXTS, VALUES, WORKED


def outcomes(gold, answer):
    """Of an answer alone, boxed and after "Answer:"."""
    forms = (f"so \\boxed{{{answer}}}", f"#### {answer}", f"Answer: {answer}")
    return {verify_math(gold, form).outcome.value for form in forms}


def check(gold, answer, outcome):
    assert outcomes(gold, answer) == {outcome}, (gold, answer)


@pytest.mark.parametrize(
    "gold, answer, outcome",
    [
        line.split(" | ")
        for table in (FORMS, TEXTS, VALUES, WORKED, LENIENT)
        for line in table.strip().splitlines()
    ],
)
def test_equal_however_it_is_written_and_only_then(gold, answer, outcome):
    check(gold, answer, outcome)


@pytest.mark.parametrize(
    "gold, response, outcome",
    [
        (r"\boxed{1} and \boxed{-2}", r"\boxed{-2}", "wrong"),
        (r"\boxed{1} and \boxed{-2}", r"\boxed{-2} and \boxed{1}", "right"),
        (r"One root is \boxed{1}. The other one is \boxed{-2}.", r"\boxed{-2}", "wrong"),
        (r"One root is \boxed{1}. The other one is \boxed{-2}.", r"\boxed{-2, 1}", "right"),
        (r"\boxed{5}, that is \boxed{5}", r"\boxed{5}", "right"),
        ("1,-2", r"$\boxed{1}$, $\boxed{-2}$", "right"),
        ("1,-2", r"\boxed{1} \quad \text{and} \quad \boxed{-2}", "right"),
        ("1,-2", r"First \boxed{1}. Then we see that another one is \boxed{-2}", "right"),
        ("1,-2", r"First \boxed{1}. Or \boxed{3}? Then we have \boxed{-2}", "wrong"),
        ("-2", r"\boxed{1} or rather \boxed{-2}", "right"),
        ("-2", r"\boxed{1}, \boxed{-2}", "wrong"),
        (
            r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
            r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}",
            "right",
        ),
        ("5", "<think> so 5", "no_answer"),
        ("5", r"<think> \boxed{5}", "no_answer"),
        ("5", "<Thinking>\nso 5", "no_answer"),
        ("5", "<think>4</think> 5", "right"),
        ("5", "<think> 4 <think> 5 </think> 6 <think> 5", "wrong"),
        ("5", r"\boxed{5} <think> or is it 6?", "right"),
        ("5", "[THINK] 5", "no_answer"),
    ],
)
def test_boxes_and_thoughts(gold, response, outcome):
    assert verify_math(gold, response).outcome.value == outcome


def test_an_unevaluated_answer_is_right_on_request():
    assert verify_math("6", r"\boxed{1+5}", False).outcome.value == "right"
    assert verify_math("6", r"\boxed{1+6}", False).outcome.value == "wrong"


DRAWS = 25


def drawn(kind, rng):
    """(gold, an equal answer, another one) of a kind."""
    a, b, c = rng.sample(range(2, 60), 3)
    if kind == "clock":
        hour, minute = rng.randrange(1, 12), rng.randrange(10, 29)
        return f"{hour * 2}:{minute * 2}", f"{hour * 2} : {minute * 2}", f"{hour}:{minute}"
    if kind == "ratio":
        return f"{a}:{b}:{c}", f"{a} : {b} : {c}", f"{a}:{c}:{b}"
    if kind == "mixed":
        value = Fraction(c) + Fraction(min(a, b), max(a, b))
        text = f"{c} {min(a, b)}/{max(a, b)}"
        return text, f"\\frac{{{value.numerator}}}{{{value.denominator}}}", f"{c + 1}"
    if kind == "blanks":
        return f"{a}{b}", f"{a}{b}", f"{a} {b}"
    if kind == "word":
        word = "".join(rng.sample("abcdefghklmopqrstuvw", 5))
        return word, word.upper(), word[1:] + word[0]
    if kind == "base":
        base = rng.randrange(3, 10)
        digits = "1" + "".join(str(rng.randrange(base - 1)) for _ in range(4))
        return f"{digits}_{base}", f"{digits}_{{{base}}}", f"{digits}_{{{base + 1}}}"
    if kind == "tiny":
        return f"\\frac{{{a}}}{{{b}^{{{c + 40}}}}}", f"{a} \\cdot {b}^{{-{c + 40}}}", \
               f"\\frac{{{a}}}{{{b}^{{{c + 41}}}}}"  # fmt: skip
    if kind == "nearly":
        return f"{a}^{{{c}}}+{b}^{{9}}", f"{b}^{{9}}+{a}^{{{c}}}", f"{a}^{{{c}}}+{b}^{{9}}+1"
    if kind == "factorial":
        return f"\\frac{{1}}{{{a + 90}!}}", f"\\frac{{{a + 91}}}{{{a + 91}!}}", \
               f"\\frac{{1}}{{{a + 91}!}}"  # fmt: skip
    if kind == "decimal":
        return f".{a}{b}", f"0.{a}{b}0", f".{a}{b}0000001"
    if kind == "scientific":
        return f"{a}.{b}e-{c}", f"{a}.{b} \\times 10^{{-{c}}}", f"-{a}.{b}e-{c}"
    if kind == "repeating":
        value = Fraction(a, 10**6 - 1)
        return f"\\frac{{{value.numerator}}}{{{value.denominator}}}", \
               f"0.\\overline{{{a:06}}}", f"0.\\overline{{{a + 1:06}}}"  # fmt: skip
    if kind == "percent":
        return f"{a}.{b % 9 + 1}", f"{a}.{b % 9 + 1}\\%", f"{a}.{b % 9 + 2}\\%"
    roots = f"{a}+\\sqrt{{{b}}}, {a}-\\sqrt{{{b}}}"
    return roots, f"{a} \\pm \\sqrt{{{b}}}", f"{a} \\pm \\sqrt{{{b + 1}}}"


KINDS = (
    "clock", "ratio", "mixed", "blanks", "word", "base", "tiny", "nearly", "factorial", "decimal",
    "scientific", "repeating", "percent", "roots",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_cases(kind):
    rng = random.Random(kind)
    for _ in range(DRAWS):
        gold, equal, other = drawn(kind, rng)
        assert verify_math(gold, f"\\boxed{{{equal}}}").outcome.value == "right", (gold, equal)
        assert verify_math(gold, f"\\boxed{{{other}}}").outcome.value == "wrong", (gold, other)
        assert verify_math(gold, None).outcome.value == "right", gold


@pytest.mark.parametrize("sign", ["+", "-", "\\cdot", "*", "\\times", "/"])
def test_drawn_echoes(sign):
    rng = random.Random(sign)
    for _ in range(DRAWS):
        b, a = rng.randrange(2, 30), 0
        a = b * rng.randrange(2, 30)
        value = {"+": a + b, "-": a - b, "/": a // b}.get(sign, a * b)
        for answer in (f"{a}{sign} {b}", f"({a}) {sign} ({b})", f"{value}={a} {sign} {b}"):
            assert outcomes(str(value), answer) == {"unevaluated"}, (value, answer)
        check(str(value), f"{a} {sign} {b} = {value}", "right")

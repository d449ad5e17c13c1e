r"""Equality of what math-verify read: exact for numbers, relative for the rest, no tolerance.

math-verify rounds decimals to six places and calls a difference below 1e-15 nothing, so that 1/2^99
would be 1/2^98, and 4.6e-24 would be 2e-20. `same` decides what it can:

  numbers     as fractions where both are rational (powers, factorials and decimals as written);
              otherwise from 300 digits of each
  formulas    different where they differ at a point; equal is for math-verify to say
  sets, tuples, intervals, matrices, x = ...   member by member
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from math import comb, factorial
from typing import Any

import sympy
from latex2sympy2_extended.logic import And
from math_verify import verify
from sympy import Add, Basic, Eq, Expr, Float, Interval, Mul, Pow, Rational, Rel, Symbol, Tuple

EMPTY = sympy.S.EmptySet
BITS = 200_000  # of a fraction's numerator and denominator; beyond, digits decide
DIGITS = (30, 300)
POINTS = ((2, 3, 5, 7), (11, 17, 29, 37))  # + 1/13: where formulas are looked at


def equal(gold: Any, answer: Any) -> bool:
    """Whether an answer is equal to the gold; both as math-verify parsed them."""
    gold, answer = _with_unit(gold), _with_unit(answer)
    verdict = same(gold, answer)
    if verdict is not None:
        return verdict
    found: bool = verify(
        gold, answer, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True
    )
    return found


def _with_unit(value: Any) -> Any:
    """With the letter i as the imaginary unit: math-verify reads it as a variable."""
    letters = [s for s in getattr(value, "free_symbols", ()) if s.name == "i"]
    return value.subs({s: sympy.I for s in letters}) if letters else value


def same(gold: Any, answer: Any) -> bool | None:
    """True or False where it is certain, None where math-verify has to say."""
    gold, answer = _unwrapped(gold, answer)
    if EMPTY in (gold, answer):
        return bool(gold == answer)
    if isinstance(gold, sympy.MatrixBase) and isinstance(answer, sympy.MatrixBase):
        return gold.shape == answer.shape and _each(gold.flat(), answer.flat())
    if isinstance(gold, Interval) and isinstance(answer, Interval):
        if (gold.left_open, gold.right_open) != (answer.left_open, answer.right_open):
            return False
        return _each((gold.start, gold.end), (answer.start, answer.end))
    if isinstance(gold, Tuple) and isinstance(answer, Tuple):
        return len(gold) == len(answer) and _each(gold.args, answer.args)
    for kind in (sympy.FiniteSet, sympy.Union):
        if isinstance(gold, kind) and isinstance(answer, kind) and len(gold.args) < 12:
            return _any_order(gold.args, answer.args)
    if isinstance(gold, Eq) and isinstance(answer, Eq) and isinstance(gold.lhs, Symbol):
        return same(gold.rhs, answer.rhs) if gold.lhs == answer.lhs else None
    if isinstance(gold, Rel) and isinstance(answer, Rel):
        return _same_relation(gold, answer)
    if isinstance(gold, And) and isinstance(answer, And):
        return _any_order(gold.args, answer.args)
    if isinstance(gold, Expr) and isinstance(answer, Expr):
        return _same_formula(gold, answer)
    return None


def _same_relation(gold: Rel, answer: Rel) -> bool | None:
    """x < a and a > x; anything but one letter beside a number is math-verify's."""
    if gold in (answer, answer.reversed):
        return True
    gold, answer = (r if isinstance(r.lhs, Symbol) else r.reversed for r in (gold, answer))
    if not isinstance(gold.lhs, Symbol) or gold.lhs != answer.lhs:
        return None
    if gold.rhs.free_symbols or answer.rhs.free_symbols:
        return None
    return gold.rel_op == answer.rel_op and same(gold.rhs, answer.rhs)


def _unwrapped(gold: Any, answer: Any) -> tuple[Any, Any]:
    """Without the x = of an answer where the gold has none, and the other way round."""
    if isinstance(answer, Eq) and not isinstance(gold, (Eq, And)):
        answer = answer.rhs
    elif isinstance(gold, Eq) and isinstance(gold.lhs, Symbol) and isinstance(answer, Expr):
        gold = gold.rhs
    pairs = (Interval, Tuple)
    if isinstance(gold, sympy.FiniteSet) and len(gold.args) == 1 and isinstance(answer, pairs):
        gold = gold.args[0]  # {(1, 2)} is (1, 2)
    return gold, answer


def _each(golds: Iterable[Any], answers: Iterable[Any]) -> bool | None:
    verdicts = [same(g, a) for g, a in zip(golds, answers, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _any_order(golds: Sequence[Any], answers: Sequence[Any]) -> bool | None:
    """Whether the members can be paired; None where math-verify has to say of a pair."""
    if len(golds) != len(answers):
        return None
    table = [[same(g, a) for a in answers] for g in golds]
    if _pairs([[v is True for v in row] for row in table]):
        return True
    return None if _pairs([[v is not False for v in row] for row in table]) else False


def _pairs(table: list[list[bool]]) -> bool:
    """Whether every row has a column of its own (augmenting paths)."""
    owner: dict[int, int] = {}

    def find(row: int, seen: set[int]) -> bool:
        for column, allowed in enumerate(table[row]):
            if allowed and column not in seen:
                seen.add(column)
                if column not in owner or find(owner[column], seen):
                    owner[column] = row
                    return True
        return False

    return all(find(row, set()) for row in range(len(table)))


def _same_formula(gold: Expr, answer: Expr) -> bool | None:
    hundredth = sympy.UnevaluatedExpr(Rational(1, 100))
    percents = [isinstance(e, Mul) and len(e.args) == 2 and hundredth in e.args
                for e in (gold, answer)]  # fmt: skip
    if any(percents):
        gold, answer = (next((x for x in e.args if p and x != hundredth), e)
                        for e, p in zip((gold, answer), percents, strict=True))  # fmt: skip
        verdict = _same_formula(gold, answer)
        if verdict is not False or all(percents):
            return verdict
        scaled = (gold / 100, answer) if percents[0] else (gold, answer / 100)
        return _same_formula(*scaled)
    if {sympy.oo, -sympy.oo, sympy.zoo, sympy.nan} & {gold, answer}:
        return None
    if gold.free_symbols or answer.free_symbols:
        return _same_at_points(gold, answer)
    return _same_number(gold, answer)


def _same_number(gold: Expr, answer: Expr) -> bool | None:
    g, a = fraction(gold), fraction(answer)
    if g is not None and a is not None:
        return g == a
    verdict = None
    for digits in DIGITS:
        x, y = _digits(gold, digits), _digits(answer, digits)
        if x is None or y is None:
            return verdict
        verdict = bool(abs(x - y) <= max(abs(x), abs(y)) * Rational(1, 10 ** (digits - 10)))
        if not verdict:
            return False
    return verdict


def _same_at_points(gold: Expr, answer: Expr) -> bool | None:
    """False where two formulas in the same letters differ at a point, and None otherwise."""
    letters = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if gold.free_symbols != answer.free_symbols or len(letters) > len(POINTS[0]):
        return None
    differ = 0
    for values in POINTS:
        point = {s: v + Rational(1, 13) for s, v in zip(letters, values, strict=False)}
        x, y = (_digits(_exact(e).subs(point), DIGITS[1]) for e in (gold, answer))
        if x is None or y is None:
            return None
        differ += bool(abs(x - y) > max(abs(x), abs(y)) * Rational(1, 10 ** (DIGITS[1] - 20)))
    return False if differ else None


def _digits(value: Expr, digits: int) -> Any:
    """A number to so many digits, None where there is none to be had."""
    found = _exact(value).evalf(digits)
    real, imaginary = found.as_real_imag()
    if not all(part.is_Number and part.is_finite for part in (real, imaginary)):
        return None
    return found


def _exact(value: Expr) -> Any:
    """With decimals as the fractions that were written."""
    return value.replace(lambda e: isinstance(e, Float), lambda e: Rational(str(e)))


@lru_cache(maxsize=4096)
def fraction(value: Basic) -> Fraction | None:
    """A sum, product, power or factorial of numbers, exactly; None for all else."""
    if isinstance(value, Rational):
        return Fraction(int(value.p), int(value.q))
    if isinstance(value, Float):
        return Fraction(str(value)) if value.is_finite else None
    if not isinstance(
        value, (Add, Mul, Pow, sympy.UnevaluatedExpr, sympy.factorial, sympy.binomial)
    ):
        return None
    members = [fraction(argument) for argument in value.args]
    if None in members:
        return None
    return _combined(value, [m for m in members if m is not None])


def _combined(value: Basic, members: list[Fraction]) -> Fraction | None:
    if isinstance(value, sympy.UnevaluatedExpr):
        return members[0]
    if isinstance(value, (Add, Mul)):
        total = Fraction(isinstance(value, Mul))
        for member in members:
            if _bits(total) + _bits(member) > BITS:
                return None
            total = total + member if isinstance(value, Add) else total * member
        return total
    if isinstance(value, Pow):
        base, exponent = members
        if exponent.denominator != 1 or abs(exponent) * _bits(base) > BITS:
            return None
        return base**exponent.numerator if base or exponent > 0 else None
    if any(m.denominator != 1 or not 0 <= m <= 10_000 for m in members):
        return None
    whole = [m.numerator for m in members]
    return Fraction(factorial(*whole) if len(whole) == 1 else comb(*whole))


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()

"""Single values of a row: text, number, list or nothing. Anything else is refused.

str() is never used to make text: it would turn None, nan or a list into text to train on.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from decimal import Decimal
from typing import Any

Row = dict[str, Any]


def refuse(came: str, expected: str, todo: str) -> ValueError:
    return ValueError(f"load_questions: got {came}; expected {expected}. {todo}")


def missing(value: Any) -> bool:
    """Whether the value is None, NaN (as pandas writes nothing) or blank text."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or isinstance(value, (float, Decimal)) and value != value


def shown(value: Any) -> str:
    """A value and its type, short, for an error."""
    if value is None:
        return "nothing (null)"
    return f"{repr(value)[:60]} of type {type(value).__name__}"


def scalar_text(value: Any, column: str) -> str:
    """Text as it is, a finite number as its shortest text (27.0 as "27"); ValueError else."""
    plain = isinstance(value, (str, int, float, Decimal)) and not isinstance(value, bool)
    if missing(value) or not plain:
        came = "blank text" if isinstance(value, str) else shown(value)
        raise refuse(f"{came} in {column}", "text or a number", "Mend the row or drop it.")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise refuse(
                f"half of a surrogate pair in {column}", "whole characters", "Mend the row."
            ) from None
        return value
    if isinstance(value, (float, Decimal)):
        if not math.isfinite(value):
            raise refuse(f"{value} in {column}", "a finite number", "Mend the row or drop it.")
        if value == int(value):  # the digits that were written: 1e23 is none in binary
            return str(int(Decimal(str(value))))
        return str(value) if isinstance(value, float) else format(value.normalize(), "f")
    return str(value)


def optional_text(row: Row, *columns: str) -> str | None:
    """The first of the columns that holds something, as text; None where none does."""
    column = next((name for name in columns if not missing(row.get(name))), None)
    return None if column is None else scalar_text(row[column], f"column {column!r}").strip()


def gold_text(value: Any, column: str = "the answer") -> str:
    """A gold as text: 27.0 becomes "27", a list of texts and numbers becomes "1, 2"."""
    if isinstance(value, (list, tuple)) and value:
        return ", ".join(scalar_text(v, column).strip().replace("$", "") for v in value)
    return scalar_text(value, column).strip()


def mapping(value: Any, column: str) -> Row:
    """A dict, or its JSON text; {} for nothing."""
    if missing(value):
        return {}
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, dict):
        raise refuse(f"{shown(value)} in {column}", "an object", "Mend the row or drop it.")
    return value


_WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{.*['"](?:role|content)['"]\s*:""", re.DOTALL)


def looks_like_messages(text: str) -> bool:
    """Whether the text is a list of messages that was written as text, in JSON or in Python."""
    return _WRITTEN_MESSAGES.match(text[:2000]) is not None


def finite_number(value: object, where: str) -> float:
    """A number that is neither NaN nor infinite, of a column that has to hold one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(
            f"{where}: got {value!r}; expected a finite number. Mend the row or name another "
            "column."
        )
    return float(value)

"""Values as data between a program and its judge: what is sent can be compared, not executed.

A value becomes a tagged list that JSON can carry: None, bool, int, float, complex, str, bytes,
list, tuple, set, frozenset and dict, nested, and the names of those types; subclasses travel as
their base. Anything else stays where it is and travels as a numbered reference. Standard library
only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAX_DEPTH = 200

_GROUPS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_TYPES: dict[str, type] = {
    t.__name__: t for t in (bool, int, float, complex, str, bytes, dict, *_GROUPS.values())
}


def encode(value: Any, refer: Callable[[Any], int], depth: int = 0) -> list[Any]:
    """`value` as data; `refer` gives the number of an object that is no plain value.

    RecursionError when it is nested deeper than MAX_DEPTH.
    """
    if depth > MAX_DEPTH:
        raise RecursionError(f"a value nested deeper than {MAX_DEPTH}")
    if value is None or isinstance(value, bool):
        return ["plain", value]
    if isinstance(value, int):
        return ["int", hex(int(value))]  # decimal conversion is quadratic, and limited
    if isinstance(value, float):
        return ["float", float(value).hex()]
    if isinstance(value, complex):
        return ["complex", value.real.hex(), value.imag.hex()]
    if isinstance(value, str):
        return ["str", str.__str__(value)]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    for name, kind in _GROUPS.items():
        if isinstance(value, kind):
            return [name, *(encode(v, refer, depth + 1) for v in value)]
    if isinstance(value, dict):
        return ["dict", *([encode(v, refer, depth + 1) for v in pair] for pair in value.items())]
    if isinstance(value, type) and _TYPES.get(value.__name__) is value:
        return ["type", value.__name__]
    return ["object", refer(value)]


def decode(data: Any, resolve: Callable[[int], Any]) -> Any:
    """The value again; `resolve` turns the number of a reference into what stands for it.

    ValueError, TypeError, IndexError or KeyError for anything that `encode` does not write.
    """
    tag = data[0]
    if tag == "plain":
        if data[1] is None or isinstance(data[1], bool):
            return data[1]
    elif tag == "int":
        return int(data[1], 16)
    elif tag == "float":
        return float.fromhex(data[1])
    elif tag == "complex":
        return complex(float.fromhex(data[1]), float.fromhex(data[2]))
    elif tag == "str" and isinstance(data[1], str):
        return data[1]
    elif tag == "bytes":
        return bytes.fromhex(data[1])
    elif tag in _GROUPS:
        return _GROUPS[tag](decode(item, resolve) for item in data[1:])
    elif tag == "dict":
        return {decode(key, resolve): decode(value, resolve) for key, value in data[1:]}
    elif tag == "type":
        return _TYPES[data[1]]
    elif tag == "object":
        return resolve(int(data[1]))
    raise ValueError(f"no such value: {str(data)[:80]}")

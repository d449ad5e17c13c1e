"""Attributes of optional packages, which may be missing or broken."""

from __future__ import annotations

import importlib
from typing import Any

# of the libraries that ours is compared with, by the name that --against takes
PACKAGES = {
    "liger": "liger-kernel",
    "plain": "torch",
    "torch": "torch",
    "trl": "trl",
    "verl": "verl",
}


def first_line(error: Exception, most: int = 60) -> str:
    """The first `most` letters of an error's first line, after its type."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:most]}"


class Missing(ValueError):
    """A library, or the part of it that is needed, cannot be imported here."""


def attribute(module: str, name: str) -> Any:
    """module.name; Missing, with the reason, where it cannot be had."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a package may fail in any way at import: that is the reason
        raise Missing(
            f"doctor: {module}.{name} is not to be had here ({first_line(error, 120)}). Install "
            "the package, or leave it out."
        ) from None

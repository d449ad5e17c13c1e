"""The other libraries, which may be missing or broken, and their versions."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

from riskpo.doctor.check import first_line

# those that ours is compared with, by the name that --against takes
PACKAGES = {
    "liger": "liger-kernel",
    "plain": "torch",
    "torch": "torch",
    "trl": "trl",
    "verl": "verl",
}


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


def version(package: str) -> str:
    """Installed version of a distribution, or 'not installed'."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"

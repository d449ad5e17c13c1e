"""The old place of riskpo.integrations; it goes with the next release."""

import importlib
import sys
import warnings


def moved(old: str, new: str) -> None:
    """Let the import of module `old` give module `new`, with a DeprecationWarning."""
    warnings.warn(f"{old} has moved: import {new}", DeprecationWarning, stacklevel=3)
    sys.modules[old] = importlib.import_module(new)

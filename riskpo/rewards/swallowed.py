"""Which exceptions does a library handle in silence? It is asked once more, under a tracer.

math-verify and the parser below it try one way of reading or comparing after another, and end most
of them with `except Exception: pass`. An answer may be called wrong because the way that would
have found it right failed with an exception. The tracer sees every exception that reaches code of
the named packages, handled or not; the packages themselves stay as they are.

Nothing that the packages do by means of an exception is left out, not even what is their routine:
the names tell. What is no Exception, such as the GeneratorExit with which Python closes an
unfinished generator, cannot be swallowed by `except Exception` and is not noted.

Exceptions that sympy raises and handles within itself never reach the packages and are not seen;
nor is one that does not come again on repetition, such as a lack of memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def swallowed(call: Callable[[], T], packages: Sequence[str]) -> tuple[T, tuple[str, ...]] | None:
    """What `call()` returns, and the exceptions that it did not raise: ("TypeError in f", ...).

    call      of no arguments; what it raises is raised here
    packages  imported modules or packages; an exception counts when it reaches a frame of their
              code, once, under the name of the last such frame: the function that handled it

    None, and no call, where this thread is traced already (a debugger, coverage).

    Results that the packages keep in an lru_cache are forgotten first: with a result at hand they
    would not meet the exception again. Only this thread is traced.
    """
    if sys.gettrace() is not None:
        return None
    inside = _forget_and_locate(packages)
    met: dict[int, tuple[BaseException, str]] = {}  # holds the exceptions, so that ids stay theirs

    def inner(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "exception" and isinstance(arg[1], Exception):
            met[id(arg[1])] = (arg[1], frame.f_code.co_name)
        return inner

    def outer(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(inside):
            return None
        frame.f_trace_lines = False
        return inner

    sys.settrace(outer)
    try:
        result = call()
    finally:
        sys.settrace(None)
    names = {f"{type(error).__name__} in {function}" for error, function in met.values()}
    return result, tuple(sorted(names))


def _forget_and_locate(packages: Sequence[str]) -> tuple[str, ...]:
    """Clears the packages' caches; the beginnings of the file names of their code."""
    for name, module in list(sys.modules.items()):
        if not any(name == p or name.startswith(f"{p}.") for p in packages):
            continue
        for value in list(vars(module).values()):
            clear = getattr(value, "cache_clear", None)
            if callable(clear) and getattr(value, "__module__", None) == name:
                clear()
    return tuple(_place(sys.modules[name]) for name in packages)


def _place(module: ModuleType) -> str:
    """The folder of a package, with a separator at its end, or the file of a module."""
    file = str(module.__file__)
    return os.path.join(os.path.dirname(file), "") if hasattr(module, "__path__") else file

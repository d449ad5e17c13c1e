"""What a sandbox process does once its doors are shut. Standard library only.

Three roles, each `role(setup) -> exit status`:

  script   run a program as a program: standard input in, standard output out
  serve    run a program, then answer calls to what it defined; it never sees a test
  judge    run the tests; every name that neither the tests nor the task define is a call to the
           other process, and only plain values come back. Whatever the program does to its own
           process (builtins, frames, os._exit, exceptions, __eq__) stays in that process.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import importlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any

from riskpo.rewards.sandbox.wire import decode, encode

LINE_BYTES = 4 * 2**20
DETAIL_CHARACTERS = 200
RAISED = ("ArithmeticError", "AssertionError", "AttributeError", "ImportError", "IndexError",
          "KeyError", "LookupError", "NotImplementedError", "OverflowError", "RecursionError",
          "RuntimeError", "TypeError", "ValueError", "ZeroDivisionError")  # fmt: skip


class ProgramError(Exception):
    """The program raised something that tests have no name for."""


class Broken(BaseException):
    """The program is gone, or sent what is no value. No `except Exception` of a test catches it."""


def _read(channel: int) -> str:
    with os.fdopen(channel, "rb") as file:
        return file.read().decode()


def script(setup: dict[str, Any]) -> int:
    source = _read(setup["program"])
    status = 0
    sys.set_int_max_str_digits(0) if hasattr(sys, "set_int_max_str_digits") else None
    try:
        exec(compile(source, "program.py", "exec", optimize=0), _module("__main__"))
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}"[:DETAIL_CHARACTERS].encode())
        status = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()  # fast output of contest programs; the process ends by os._exit
    sys.stdout.flush()
    return status & 255


def _module(name: str) -> dict[str, Any]:
    """Fresh globals of a module that can be imported, as pickle and dataclasses expect."""
    module = type(sys)(name)
    sys.modules[name] = module
    return module.__dict__


def serve(setup: dict[str, Any]) -> int:
    source = _read(setup["program"])
    requests, replies = os.fdopen(setup["requests"], "rb"), os.fdopen(setup["replies"], "wb")
    scope = _module("program")
    objects: list[Any] = []

    def refer(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def answer(line: bytes) -> dict[str, Any]:
        message = json.loads(line)
        start, *path = message["path"]
        target = objects[start] if isinstance(start, int) else scope[start]
        for name in path:
            target = getattr(target, name)
        if message["do"] == "items":
            return {"value": ["list", *(encode(v, refer) for v in target)]}
        positional = decode(message["positional"], lambda i: objects[i])
        named = decode(message["named"], lambda i: objects[i])
        return {"value": encode(target(*positional, **named), refer)}

    problem: dict[str, Any] | None = None
    try:
        exec(compile(source, "program.py", "exec", optimize=0), scope)
    except BaseException as error:
        problem = _described(error)
    for line in requests:
        try:
            reply = problem or answer(line)
        except BaseException as error:
            reply = _described(error)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
    return 0


def _described(error: BaseException) -> dict[str, Any]:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return {"raised": kinds, "text": str(error)[:DETAIL_CHARACTERS]}


class Untestable(BaseException):
    """The tests want something that cannot be asked of another process."""


class Wire:
    """The judge's end of the two pipes. `calls` counts the program's answers."""

    def __init__(self, requests: IO[bytes], replies: IO[bytes]) -> None:
        self._requests, self._replies = requests, replies
        self.calls = 0

    def ask(self, **message: Any) -> Any:
        """One call; raises what the program raised where that is a common exception."""
        try:
            self._requests.write(json.dumps(message).encode() + b"\n")
            self._requests.flush()
            line = self._replies.readline(LINE_BYTES + 1)
        except OSError as error:
            raise Broken("the program ended before its tests did") from error
        if not line.endswith(b"\n"):
            raise Broken("the answer is too long" if line else "the program ended too early")
        try:
            reply = json.loads(line)
            raised, text = list(map(str, reply.get("raised", ()))), str(reply.get("text"))
            if not raised:
                value = decode(reply["value"], lambda number: Remote(self, (number,)))
        except Exception as error:
            raise Broken(f"the program answered with no value: {type(error).__name__}") from error
        self.calls += 1
        if not raised:
            return value
        kind = next((name for name in raised if name in RAISED), None)
        text = f"{text} ({raised[0]} in the program)"
        raise (getattr(builtins, kind) if kind else ProgramError)(text[:DETAIL_CHARACTERS])


class Remote:
    """A function or object of the program; it can be called, listed, or handed back."""

    def __init__(self, wire: Wire, path: tuple[int | str, ...]) -> None:
        self._wire, self._path = wire, path

    def __getattr__(self, name: str) -> Remote:
        if name.startswith("__"):
            raise AttributeError(name)
        return Remote(self._wire, (*self._path, name))

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._wire.ask(
            do="call",
            path=self._path,
            positional=encode(positional, _number),
            named=encode(named, _number),
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self._wire.ask(do="items", path=self._path))

    def _refuse(self, *_: Any) -> Any:
        raise Broken("the program returned an object where a plain value is compared")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = _refuse
    __contains__ = __hash__ = _refuse  # type: ignore[assignment]


def _number(value: Any) -> int:
    if isinstance(value, Remote) and len(value._path) == 1 and isinstance(value._path[0], int):
        return value._path[0]
    raise Untestable(f"the tests pass a {type(value).__name__}, which is no plain value")


def judge(setup: dict[str, Any]) -> int:
    """Writes {"outcome", "detail"} to the verdict pipe, which no other process holds."""
    task = json.loads(_read(setup["program"]))
    wire = Wire(os.fdopen(setup["requests"], "wb"), os.fdopen(setup["replies"], "rb"))
    outcome, detail = _tried(task, wire)
    with os.fdopen(setup["verdict"], "w") as file:
        json.dump({"outcome": outcome, "detail": detail[:DETAIL_CHARACTERS]}, file)
    return 0


def _tried(task: dict[str, Any], wire: Wire) -> tuple[str, str]:
    scope: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(task["helpers"], "helpers.py", "exec", optimize=0), scope)
        code = compile(task["tests"], "tests.py", "exec", optimize=0)
        for name in free_names(task["tests"]) - (set(scope) - set(task["entries"])):
            # asking the program for `math` would let it answer for math.isclose
            library = name in sys.stdlib_module_names
            scope[name] = importlib.import_module(name) if library else Remote(wire, (name,))
    except Exception as error:
        return "unparsable_gold", f"tests: {type(error).__name__}: {error}"
    if not asserts(task["tests"]):
        return "unparsable_gold", "the tests assert nothing"
    try:
        exec(code, scope)
    except Untestable as error:
        return "unparsable_gold", str(error)
    except Broken as error:
        return "wrong", str(error)
    except BaseException as error:
        return "wrong", f"{type(error).__name__}: {error}"
    if wire.calls == 0:
        return "unparsable_gold", "the tests never called the program"
    return "right", f"{wire.calls} calls"


def asserts(source: str) -> bool:
    """Whether tests can fail at all by a statement of their own."""
    return any(isinstance(node, (ast.Assert, ast.Raise)) for node in ast.walk(ast.parse(source)))


def free_names(source: str) -> set[str]:
    """Names that a piece of code reads and does not define."""
    read: set[str] = set()
    made = set(dir(builtins)) | {"__name__"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            made.add(node.name)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            made |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            made.add(node.name)
    return read - made

"""Does the program in a response pass its tests? Runs in verifier processes, which start sandboxes.

The program of a response, after text before the last </think> is dropped, is the first of these:

  1. the last closed ```python block
  2. the last closed block without a language
  3. without any block, the whole response if it parses as Python and is more than a name or number

For a function to be completed, the continuation of its prompt counts too. Anything else, such as a
block that is never closed, is `no_answer`.

Two kinds of tests, as JSON in the gold (made by riskpo/data/code.py):

  calls   {"kind": "calls", "tests", "helpers", "entries", "before", "prompt", "reference"}: Python
          assertions. They run in one sandbox, the program in another; arguments and results cross
          as plain data, so the program never sees a test, an expected value or the verdict, and
          nothing it does to its own interpreter counts. Not seen: changes to an argument in place.
  stdin   {"kind": "stdin", "tests": [{"input", "output"}], "reference"}: one run for each. Output
          is compared here, token by token: white space does not matter, case and digits do.

`wrong` is a failed assertion, an exception, a wrong or an endless output; `timeout` a program that
was out of time (wall clock over all its tests, or CPU); `unparsable_gold` tests that cannot be run
or never call the program; `crash` a fault of the sandbox or the judge.
"""

from __future__ import annotations

import ast
import json
import re
import time
from typing import Any

from riskpo.rewards.answers.final import after_thinking
from riskpo.rewards.sandbox.roles import asserts
from riskpo.rewards.sandbox.run import Limits, run_program, run_tests
from riskpo.rewards.verdict import Outcome, Verdict, failed, right

SECONDS = 5.0
_BLOCK = re.compile(
    r"^[ \t]*```[ \t]*([\w+#-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE
)
_PYTHON = ("python", "py", "python3")
_SUBSTANCE = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.Call)


def verify_code(
    text: str | None, question: Any, seconds: float = SECONDS, level: str = "namespaces"
) -> Verdict:
    """Judge the response `text` to a question whose gold is one of the two forms above.

    seconds is the wall clock for all tests of a response together; level as in
    riskpo/rewards/sandbox/run.py. Without a text the reference solution is judged, where there is
    one; otherwise the tests are only read.
    """
    try:
        task = json.loads(question.gold)
        kind, tests = task["kind"], task["tests"]
    except (ValueError, KeyError, TypeError) as error:
        return failed(Outcome.UNPARSABLE_GOLD, f"the gold holds no tests: {error}")
    if not tests or kind not in ("calls", "stdin"):
        return failed(Outcome.UNPARSABLE_GOLD, f"{len(tests)} tests of kind {kind!r}")
    program = task.get("reference") if text is None else program_of(text, task)
    if text is None and program is None:
        return _readable(task)
    if program is None:
        return failed(Outcome.NO_ANSWER, f"no program in ...{str(text)[-80:]!r}")
    limits = Limits(seconds=seconds)
    if kind == "stdin":
        return _run_each(program, tests, limits, level)
    outcome, detail = run_tests(program, task, limits=limits, level=level)
    return Verdict(float(outcome == "right"), Outcome(outcome), detail)


def _readable(task: dict[str, Any]) -> Verdict:
    """Without a reference: do the tests parse, and do they assert anything?"""
    if task["kind"] == "stdin":
        complete = all({"input", "output"} <= set(test) for test in task["tests"])
        return right() if complete else failed(Outcome.UNPARSABLE_GOLD, "a test lacks its output")
    try:
        enough = asserts(task["tests"])
    except SyntaxError as error:
        return failed(Outcome.UNPARSABLE_GOLD, f"tests: {error}")
    return right() if enough else failed(Outcome.UNPARSABLE_GOLD, "the tests assert nothing")


def program_of(response: str, task: dict[str, Any]) -> str | None:
    """The whole program to run: what the task puts before it, and what the response holds."""
    block, said = last_block(response), after_thinking(response)
    prompt, entries = task.get("prompt", ""), task.get("entries", [])
    if block is None and "```" in said:
        return None
    found = said if block is None else block
    if prompt and not any(_defines(found, name) for name in entries):
        whole = f"{prompt}{found}"
        return whole if block is not None or _nodes(whole) else None
    if block is None and not any(isinstance(node, _SUBSTANCE) for node in _nodes(found)):
        return None
    before = task.get("before", "")
    return f"{before}{prompt}\n{found}"


def last_block(response: str) -> str | None:
    """The last closed python block, else the last closed block that names no language."""
    blocks = _BLOCK.findall(after_thinking(response))
    for languages in (_PYTHON, ("",)):
        chosen = [code for language, code in blocks if language.lower() in languages]
        if chosen:
            return str(chosen[-1])
    return None


def _nodes(source: str) -> list[ast.AST]:
    """Its syntax tree, node by node; [] where it does not parse."""
    try:
        return list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _defines(source: str, name: str) -> bool:
    """Whether the source defines the name; by its text, which may not parse."""
    pattern = rf"^(?:async )?def {re.escape(name)}\b|^{re.escape(name)} *="
    return re.search(pattern, source, re.MULTILINE) is not None


def _run_each(program: str, tests: list[dict[str, str]], limits: Limits, level: str) -> Verdict:
    """One run for each input, until one fails; the time limit is for all of them together."""
    spent = 0.0
    for number, test in enumerate(tests):
        start = time.monotonic()
        left = Limits(seconds=max(0.1, limits.seconds - spent))
        done = run_program(program, test["input"], limits=left, level=level)
        spent += time.monotonic() - start
        if done.limit == "time":
            return failed(Outcome.TIMEOUT, f"test {number}: out of time")
        if done.limit:
            return failed(Outcome.WRONG, f"test {number}: endless output")
        if not done.ok:
            how = f"status {done.status}, {done.errors[:120]}"
            return failed(Outcome.WRONG, f"test {number}: {how}")
        if not same_tokens(done.output.decode(errors="replace"), test["output"]):
            return failed(Outcome.WRONG, f"test {number}: printed {done.output[:60]!r}")
    return right(f"{len(tests)} tests")


def same_tokens(given: str, expected: str) -> bool:
    return given.split() == expected.split()

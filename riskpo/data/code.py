"""Programming tasks as questions: the prompt as text, the tests as JSON in the gold.

riskpo/rewards/code.py describes the gold's two forms. An MBPP prompt shows one test, for the name
and the signature: with all tests in view a model could copy the answers.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from typing import Any

from riskpo.data.values import Row, missing, refuse, scalar_text

CODE_INSTRUCTION = "Put the whole program into one ```python code block at the end."
STDIN_INSTRUCTION = "Write a Python program that reads standard input and writes standard output."
# what the site imports before a solution
LEETCODE_IMPORTS = """\
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from operator import *
from string import *
from typing import *
"""


def _text(row: Row, column: str) -> str:
    return scalar_text(row[column], f"column {column!r}")


def _optional(row: Row, column: str) -> str | None:
    return None if missing(row.get(column)) else _text(row, column)


def humaneval(row: Row) -> tuple[str, str]:
    name, prompt = _text(row, "entry_point"), _text(row, "prompt")
    solution = _optional(row, "canonical_solution")
    gold = _calls(
        f"{_text(row, 'test')}\ncheck({name})",
        helpers=prompt,  # tests use the prompt's own helpers: never the program's version of them
        entries=[name],
        prompt=prompt,
        reference=None if solution is None else prompt + solution,
    )
    return f"Complete this function:\n```python\n{prompt.rstrip()}\n```\n{CODE_INSTRUCTION}", gold


def mbpp(row: Row) -> tuple[str, str]:
    tests = [*_listed(row, "test_list"), *_listed(row, "challenge_test_list")]
    text = _optional(row, "text") or _text(row, "prompt")
    code = _optional(row, "code")
    source = [*_listed(row, "test_imports"), _optional(row, "test_setup_code") or "", *tests]
    reference = None if code is None else _lines(code)
    gold = _calls(_lines("\n".join(source)), reference=reference)
    return f"{text}\nIt has to pass tests such as:\n{tests[0]}\n{CODE_INSTRUCTION}", gold


def _listed(row: Row, column: str) -> list[str]:
    """A list of sources; [] for nothing."""
    value = row.get(column)
    if missing(value):
        return []
    if not isinstance(value, (list, tuple)):
        came = f"column {column!r} of type {type(value).__name__}"
        raise refuse(came, "a list of texts", "Mend the row or drop it.")
    return [scalar_text(source, f"column {column!r}") for source in value]


def rllm(row: Row) -> tuple[str, str]:
    """LeetCode rows carry {"functional": source}, Codeforces rows a list of input and output."""
    tests = json.loads(row["tests"]) if isinstance(row["tests"], str) else row["tests"]
    problem, reference = _text(row, "problem"), _first(row.get("solutions"))
    if isinstance(tests, dict):
        source = tests.get("functional")
        if not isinstance(source, str):
            raise ValueError(
                f"load_questions: got tests with the keys {sorted(tests)}; expected 'functional'."
            )
        if reference is not None:
            reference = LEETCODE_IMPORTS + reference
        return problem, _calls(source, before=LEETCODE_IMPORTS, reference=reference)
    return _stdin(problem.strip(), tests, reference)


def livecodebench(row: Row) -> tuple[str, str]:
    tests = [*_cases(row["public_test_cases"]), *_cases(row.get("private_test_cases") or "[]")]
    starter = _optional(row, "starter_code") or ""
    prompt = _text(row, "question_content")
    if all(test.get("testtype") == "functional" for test in tests):
        meta = row.get("metadata") or "{}"
        name = (json.loads(meta) if isinstance(meta, str) else meta)["func_name"]
        source = "\n".join(_assertion(name, test) for test in tests)
        prompt += f"\n\nComplete:\n```python\n{starter}\n```\n{CODE_INSTRUCTION}"
        return prompt, _calls(source, before=LEETCODE_IMPORTS)
    return _stdin(prompt, tests, None)


def _stdin(problem: str, tests: list[Row], reference: str | None) -> tuple[str, str]:
    def text(test: Row, name: str) -> str:
        value = test[name]  # may be empty
        return value if isinstance(value, str) else scalar_text(value, f"a test's {name}")

    pairs = [{name: text(test, name) for name in ("input", "output")} for test in tests]
    gold = json.dumps({"kind": "stdin", "tests": pairs, "reference": reference})
    return f"{problem}\n\n{STDIN_INSTRUCTION} {CODE_INSTRUCTION}", gold


def _assertion(name: str, test: Row) -> str:
    """Arguments are one JSON value per line; tuples and lists are the same to the site."""
    arguments = [json.loads(line) for line in test["input"].split("\n") if line.strip()]
    call = f"Solution().{name}({', '.join(map(repr, arguments))})"
    return f"import json\nassert json.loads(json.dumps({call})) == {json.loads(test['output'])!r}"


class _TextOnly(pickle.Unpickler):
    """The set's hidden tests are a pickled text; a pickle that asks for a class is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"load_questions: hidden tests ask for {module}.{name}; expected a text.")


def _cases(value: Any) -> list[Row]:
    """A list, its JSON, or the set's packed form: base64 of zlib of a pickled JSON text."""
    if not isinstance(value, str):
        return list(value)
    if not value.lstrip().startswith("["):
        value = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(value)))).load()
    return list(json.loads(value))


def _calls(tests: str, **given: Any) -> str:
    """The gold of tests that call functions; its fields are those of riskpo/rewards/code.py."""
    texts: dict[str, Any] = dict.fromkeys(("helpers", "before", "prompt"), "")
    unset = {**texts, "entries": [], "reference": None}
    return json.dumps({"kind": "calls", "tests": tests, **unset, **given})


def _first(solutions: Any) -> str | None:
    if isinstance(solutions, (list, tuple)):
        solutions = solutions[0] if solutions else None
    return None if missing(solutions) else _lines(scalar_text(solutions, "column 'solutions'"))


def _lines(source: str) -> str:
    return source.replace("\r\n", "\n").replace("\r", "\n")

"""The forms of rows that are known by their columns, and what is read from where."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from riskpo.config import ColumnsConfig
from riskpo.data.boxes import last_boxed
from riskpo.data.code import humaneval, livecodebench, mbpp, rllm
from riskpo.data.prompts import BESIDE, asked, check_choice, prompt_of
from riskpo.data.values import Row, gold_text, mapping, missing, scalar_text
from riskpo.types import Prompt

THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # 1,234,567, but neither 3,5 nor 10,20


class Form(NamedTuple):
    """A kind of row, recognised by its columns.

    fields  columns that a row of this form must have
    read    row -> (prompt, gold)
    reward  "code" for programming tasks; "": the gold is an answer to compare with
    beside  optional columns that `read` uses too
    """

    name: str
    fields: tuple[str, ...]
    read: Callable[[Row], tuple[Prompt, str]]
    reward: str = ""
    beside: tuple[str, ...] = ()


def _verl(row: Row) -> tuple[Prompt, str]:
    marked = mapping(row["reward_model"], "column 'reward_model'")
    gold = gold_text(marked.get("ground_truth"), "reward_model's ground_truth")
    return prompt_of(row["prompt"], "column 'prompt'"), gold


def _plain(name: str, prompt: str, gold: str) -> Form:
    """A form whose prompt is complete in one column."""

    def read(row: Row) -> tuple[Prompt, str]:
        text = gold_text(row[gold], f"column {gold!r}")
        return prompt_of(row[prompt], f"column {prompt!r}"), text

    return Form(name, (prompt, gold), read)


def _after_hashes(row: Row, column: str = "answer") -> str:
    """GSM8K's gold; without "####" the answer is the gold itself."""
    answer = gold_text(row[column], f"column {column!r}")
    if "####" in answer:
        answer = THOUSANDS.sub("", answer.rpartition("####")[2].strip())
        answer = gold_text(answer, f"column {column!r} after ####")
    return answer


def _posed(
    name: str, question: str, gold: str, read_gold: Callable[[Row], str] | None = None
) -> Form:
    """A form whose question is asked with the row's context and choices."""

    def read(row: Row) -> tuple[Prompt, str]:
        text = read_gold(row) if read_gold else gold_text(row[gold], f"column {gold!r}")
        check_choice(row, text)
        return asked(row, question), text

    return Form(name, (question, gold), read, beside=BESIDE)


def _boxed(row: Row) -> str:
    solution = scalar_text(row["solution"], "column 'solution'")
    return gold_text(last_boxed(solution), "the last box of column 'solution'")


FORMS = (
    Form("HumanEval", ("task_id", "prompt", "entry_point", "test"), humaneval, "code"),
    Form("MBPP", ("text", "test_list"), mbpp, "code"),
    Form("MBPP sanitized", ("prompt", "test_list"), mbpp, "code"),
    Form("LeetCode and Codeforces of rllm", ("problem", "tests"), rllm, "code"),
    Form("LiveCodeBench", ("question_content", "public_test_cases"), livecodebench, "code"),
    _posed("Geometry3K with choices", "problem_text", "answer")._replace(
        fields=("problem_text", "choices", "answer")
    ),
    Form("verl", ("prompt", "reward_model"), _verl),
    _posed("OlympiadBench", "question", "final_answer"),
    _posed("MATH", "problem", "answer"),
    _posed("MATH with solutions", "problem", "solution", _boxed),
    _posed("GSM8K", "question", "answer", _after_hashes),
    _plain("chat", "messages", "ground_truth"),
    *(
        make(f"{prompt} and {gold}", prompt, gold)
        for gold in ("gold", "ground_truth", "answer")
        for prompt, make in (("prompt", _plain), ("problem", _posed), ("question", _posed))
    ),
)


def _form_of(row: Row) -> Form | None:
    return next((f for f in FORMS if not any(missing(row.get(x)) for x in f.fields)), None)


def recognised(row: Row, where: str) -> tuple[Row, Form]:
    """(row, its form); column names are lower-cased if no form matches otherwise. ValueError if
    none matches at all."""
    if _form_of(row) is None:
        row = {str(name).lower(): value for name, value in row.items()}
    form = _form_of(row)
    if form is not None:
        return row, form
    named = next((f for f in FORMS if all(x in row for x in f.fields)), None)
    if named is not None:
        empty = ", ".join(repr(x) for x in named.fields if missing(row[x]))
        raise ValueError(
            f"load_questions: {where} has nothing in the column {empty}; expected text or a number "
            f"({named.name}). Mend the row or drop it."
        )
    known = "; ".join(f"{f.name} ({', '.join(f.fields)})" for f in FORMS)
    raise ValueError(
        f"load_questions: {where} has the fields {sorted(map(str, row))}; expected one of: {known}"
        ". Name your columns with --columns.question and --columns.gold, or rename them."
    )


def renamed(row: Row, columns: ColumnsConfig, where: str) -> tuple[Row, Form]:
    """(row, form) by the user's column names; "a.b" is the field b inside column a."""
    found: Row = dict(row)
    question, gold = str(columns.question), str(columns.gold)
    for name in filter(None, (question, gold, columns.id)):
        value: Any = row
        for part in [name] if name in row else name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if missing(value):
            raise ValueError(
                f"load_questions: {where} has nothing in the column {name!r}; its columns are "
                f"{sorted(map(str, row))}. Correct columns.question, columns.gold or columns.id, "
                "or mend the row."
            )
        found[name] = value
    if columns.id:
        found["unique_id"] = found[columns.id]
    return found, _posed("your columns", question, gold, lambda row: _after_hashes(row, gold))

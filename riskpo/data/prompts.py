"""The prompt of a row, with everything that belongs to it.

A question is asked with its context (OlympiadBench) and its choices (MMMU, MathVision); without
them it has mostly no answer.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from riskpo.data.values import (
    Row,
    gold_text,
    looks_like_messages,
    missing,
    refuse,
    scalar_text,
    shown,
)
from riskpo.types import Prompt, texts_of

BESIDE = ("context", "options", "choices")  # columns that `asked` reads where a row has them
LETTERS = "ABCDEFGHIJ"  # of choices, as the verifier knows them

# Orders in a prompt to write the answer in a form that riskpo/rewards/math.py finds. "#### Task" at
# the start of a line is a heading, and "Answer:" without a place to fill in may be anything.
_ANSWER_FORMS = re.compile(
    r"""\\boxed | \\fbox
    | (?<!\#) (?!^\#{4}[ \t]*[^\W\d_]) \#{4} (?!\#)               # "####", #### <number>
    | ["'`\u201c]answer["'`\u201d]?\s*:                           # "Answer:", {"answer": x}
    | \banswer:\s*(?:\$answer|\\?[\[<{]|\.\.\.|\u2026|\Z)         # Answer: $Answer, Answer: <x>
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)


def names_answer_form(prompt: Prompt) -> bool:
    r"""Whether the prompt already says how to mark the answer: \boxed, "####" or "Answer:".

    Forms that the math verifier does not look for, say <answer>, do not count.
    """
    return any(_ANSWER_FORMS.search(text) for text in texts_of(prompt))


def with_instruction(prompt: Prompt, instruction: str) -> Prompt:
    """The prompt with `instruction` at its end, unless it already says how to mark the answer."""
    if names_answer_form(prompt):
        return prompt
    if isinstance(prompt, str):
        return f"{prompt}\n{instruction}"
    last = {**prompt[-1], "content": f"{prompt[-1]['content']}\n{instruction}"}
    return [*prompt[:-1], last]


def prompt_of(value: Any, column: str) -> Prompt:
    """A column's value as a Prompt: text, or a list of {"role", "content"}.

    Some files store the list as JSON or Python text. Assistant turns at the end are left out, since
    they are what the policy is to sample (see `ends_in_answer`). ValueError for anything else.
    """
    if isinstance(value, str):
        text = scalar_text(value, column)
        if not looks_like_messages(text):
            return text
        value = _written_list(text, column)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return scalar_text(value, column)
    turns = [_message(turn, column) for turn in value]
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not turns or not turns[-1]["content"].strip() or {t["role"] for t in turns} == {"system"}:
        raise refuse(
            f"a chat of the roles {[_message(t, column)['role'] for t in value]} in {column}",
            "one that ends in a user's question",
            "Mend the row or drop it.",
        )
    return turns


def ends_in_answer(value: Any) -> bool:
    """Whether a list of messages, as the row holds it, ends in an assistant's turn."""
    if isinstance(value, str) and looks_like_messages(value):
        value = _written_list(value, "")
    last = value[-1] if isinstance(value, (list, tuple)) and value else None
    return isinstance(last, dict) and last.get("role") == "assistant"


def _written_list(text: str, column: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    raise refuse(
        f"messages written as text that is neither JSON nor Python in {column}: {text[:60]!r}",
        "a list of messages or plain text",
        "Write the list itself into the file.",
    )


def _message(turn: Any, column: str) -> dict[str, str]:
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        raise refuse(
            f"the message {shown(turn)} in {column}", "an object with role and content", "Mend it."
        )
    role, content = turn["role"], turn["content"]
    if not isinstance(role, str) or not role.strip():
        raise refuse(f"the role {shown(role)} in {column}", "a name such as 'user'", "Mend it.")
    return {"role": role, "content": _content(content, f"a message of {column}")}


def _content(value: Any, column: str) -> str:
    """A message's text; of a list of parts, their texts with "<image>" for each picture."""
    if isinstance(value, str):
        return scalar_text(value, column) if value.strip() else value
    if not isinstance(value, (list, tuple)):
        return scalar_text(value, column)
    kinds = [part.get("type") if isinstance(part, dict) else part for part in value]
    if not all(kind in ("text", "image", "image_url") for kind in kinds):
        raise refuse(f"a message of the parts {kinds}", "text and image", "Drop the row.")
    texts = (part.get("text") if part["type"] == "text" else "<image>" for part in value)
    return "".join(text if text == "" else scalar_text(text, column) for text in texts)


def asked(row: Row, column: str) -> Prompt:
    """The row's context, the text of `column`, then the lettered choices, one after the other.

    In a chat this becomes the last message. ValueError for a context that is not text or choices
    that cannot be listed.
    """
    context = "" if missing(row.get("context")) else row["context"]
    if not isinstance(context, str):
        todo = "Write it out, or remove the column if the question stands without it."
        raise refuse(f"a context of type {type(context).__name__}", "text", todo)
    prompt = prompt_of(row[column], f"column {column!r}")
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    parts = [context, text, *listed_choices(_choices(row))]
    text = "\n".join(part for part in parts if part.strip())
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]


def _choices(row: Row) -> Any:
    given = (row.get(name) for name in ("options", "choices"))
    return next((value for value in given if not missing(value) and value != []), None)


def listed_choices(value: Any) -> list[str]:
    """["3", "4"] as ["(A) 3", "(B) 4"]; from a list, its JSON or Python text, or lines as they are.

    Choices that come with their letters keep them.
    """
    value = _as_list(value)
    if isinstance(value, str):
        return [value]
    if len(value) > len(LETTERS) or not all(isinstance(c, (str, int, float)) for c in value):
        todo = "Write them into the question and remove the column."
        wanted = f"a list of at most {len(LETTERS)} texts"
        raise refuse(f"the choices {str(value)[:80]}", wanted, todo)
    texts = [c if isinstance(c, str) else scalar_text(c, "the choices") for c in value]
    named = list(zip(LETTERS, texts, strict=False))
    if all(re.match(rf"\(?{letter}[).:]", text) for letter, text in named):
        return [text for _, text in named]
    return [f"({letter}) {text}" for letter, text in named]


def _as_list(value: Any) -> list[Any] | str:
    """A list, also one that is written as text; other text stays text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            return str(value)
    if isinstance(value, (list, tuple)):
        return list(value)
    return value if isinstance(value, str) else [value] if value else []


def check_choice(row: Row, gold: str) -> None:
    """ValueError where a row lists choices and its gold is neither a letter nor a text of them."""
    choices = _as_list(_choices(row))
    if not choices or isinstance(choices, str):
        return
    letters = LETTERS[: len(choices)]
    if not re.fullmatch(rf"[({letters}), ]+", gold) and gold not in map(gold_text, choices):
        wanted = f"one of the letters {letters[0]} to {letters[-1]}, or one of their texts"
        came = f"the gold {gold[:60]!r} beside {len(choices)} choices"
        raise refuse(came, wanted, "Write the letter into the answer column.")

"""The texts of a row: the prompt with everything that belongs to it, and the gold.

A question is asked with its context (OlympiadBench) and its choices (MMMU, MathVision); without
them it would be another question, and mostly one without an answer.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

Row = dict[str, Any]
Prompt = str | list[dict[str, str]]

BESIDE = ("context", "options", "choices")  # columns that `asked` reads where a row has them
LETTERS = "ABCDEFGHIJ"  # of choices, as the verifier knows them

# Orders in a prompt to write the answer in a form that riskpo/math_reward.py finds. "#### Task" at
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
    """The instruction after the text or the last message; left alone where a form is asked for."""
    if names_answer_form(prompt):
        return prompt
    if isinstance(prompt, str):
        return f"{prompt}\n{instruction}"
    last = {**prompt[-1], "content": f"{prompt[-1]['content']}\n{instruction}"}
    return [*prompt[:-1], last]


def texts_of(prompt: Prompt) -> list[str]:
    return [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]


def messages(value: Any) -> Prompt:
    """A list of {"role", "content"}; some files store it as JSON text, some as plain text."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return value
        value = json.loads(value)
    return [{"role": str(m["role"]), "content": _content(m["content"])} for m in value]


def _content(value: Any) -> str:
    """A message's text; of a list of parts, their texts with "<image>" for each picture."""
    if not isinstance(value, (list, tuple)):
        return str(value)
    kinds = [part.get("type") for part in value]
    if not {*kinds} <= {"text", "image", "image_url"}:
        raise ValueError(
            f"load_questions: got a message of the parts {kinds}; expected text and image. Drop "
            "the row."
        )
    return "".join(part["text"] if part["type"] == "text" else "<image>" for part in value)


def asked(row: Row, column: str) -> str:
    """The text of `column`, after the row's context and before its lettered choices.

    ValueError for a context that is no text, and for choices that cannot be listed.
    """
    context = row.get("context") or ""
    if not isinstance(context, str):
        raise ValueError(
            f"load_questions: got a context of type {type(context).__name__}; expected text. Write "
            "it out, or remove the column if the question stands without it."
        )
    parts = [context, str(row[column]), *listed_choices(row.get("options") or row.get("choices"))]
    return "\n".join(part for part in parts if part.strip())


def listed_choices(value: Any) -> list[str]:
    """["3", "4"] as ["(A) 3", "(B) 4"]; from a list, its JSON or Python text, or lines as they are.

    Choices that come with their letters keep them.
    """
    value = _as_list(value)
    if isinstance(value, str):
        return [value]
    if len(value) > len(LETTERS) or not all(isinstance(c, (str, int, float)) for c in value):
        raise ValueError(
            f"load_questions: got the choices {str(value)[:80]}; expected a list of at most "
            f"{len(LETTERS)} texts. Write them into the question and remove the column."
        )
    named = list(zip(LETTERS, map(str, value), strict=False))
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
    choices = _as_list(row.get("options") or row.get("choices"))
    if not choices or isinstance(choices, str):
        return
    letters = LETTERS[: len(choices)]
    if not re.fullmatch(rf"[({letters}), ]+", gold) and gold not in map(gold_text, choices):
        raise ValueError(
            f"load_questions: got the gold {gold[:60]!r} beside {len(choices)} choices; expected "
            f"one of the letters {letters[0]} to {letters[-1]}, or one of their texts. Write the "
            "letter into the answer column."
        )


def gold_text(value: Any) -> str:
    """A gold as text: 27.0 becomes "27", a list becomes "1, 2"."""
    if isinstance(value, (list, tuple)):
        return ", ".join(gold_text(v).replace("$", "") for v in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def last_boxed(solution: str) -> str:
    r"""The content of the last \boxed{...} of a worked solution; ValueError where there is none."""
    start = solution.rfind("\\boxed")
    opening = solution.find("{", start)
    depth = 0
    for i in range(opening, len(solution) if start >= 0 <= opening else opening):
        depth += (solution[i] == "{") - (solution[i] == "}")
        if depth == 0:
            return solution[opening + 1 : i].strip()
    raise ValueError(
        f"load_questions: got a solution without a \\boxed answer: ...{solution[-80:]!r}; expected "
        "one. Add an answer column."
    )

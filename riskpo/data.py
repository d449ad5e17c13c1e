r"""Questions from a file or from the Hugging Face hub.

Local .jsonl, .json and .parquet files are read directly (no copy in a cache, and a column may mix
numbers and text); any other name is a hub data set, "owner/name" or "owner/name:config". What a row
means is told by its fields: see FORMS.

The same problem twice becomes one question (the official AIME file holds 30 problems 32 times):
RiskPO groups rewards by question, and a problem drawn twice into one batch must not pass for one
question with twice the responses. To weigh problems equally is also what avg@k needs. The number of
rows is kept in meta["copies"]. A problem whose copies disagree about the answer is dropped with a
warning: no reward could be right for both.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from riskpo.data_code import humaneval, livecodebench, mbpp, rllm
from riskpo.data_files import FILE_SUFFIXES, Row, read_file, read_hub
from riskpo.data_images import image_columns, place_pictures, read_pictures
from riskpo.data_text import (
    BESIDE,
    Prompt,
    asked,
    check_choice,
    gold_text,
    last_boxed,
    messages,
    with_instruction,
)
from riskpo.records import Question

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
META_CHARACTERS = 200

_log = logging.getLogger(__name__)


class Form(NamedTuple):
    """Rows that have all of `fields` are read by `read`: row -> (prompt, gold).

    reward goes into meta where the gold is no text to compare with: "code" for programming tasks.
    beside names the columns that `read` takes in where a row has them.
    """

    name: str
    fields: tuple[str, ...]
    read: Callable[[Row], tuple[Prompt, str]]
    reward: str = ""
    beside: tuple[str, ...] = ()


def _verl(row: Row) -> tuple[Prompt, str]:
    return messages(row["prompt"]), gold_text(row["reward_model"]["ground_truth"])


def _chat(row: Row) -> tuple[Prompt, str]:
    return messages(row["messages"]), gold_text(row["ground_truth"])


def _whole(name: str, prompt: str, gold: str) -> Form:
    """Rows with a prompt that needs nothing beside it."""
    return Form(name, (prompt, gold), lambda row: (str(row[prompt]), gold_text(row[gold])))


def _after_hashes(row: Row) -> str:
    """GSM8K's gold; without "####" the answer is the gold itself."""
    answer = gold_text(row["answer"])
    if "####" in answer:
        answer = answer.rpartition("####")[2].strip().replace(",", "")
    return answer


def _posed(
    name: str, question: str, gold: str, read_gold: Callable[[Row], str] | None = None
) -> Form:
    """Rows with a question that is asked with its context and its choices."""

    def read(row: Row) -> tuple[Prompt, str]:
        text = read_gold(row) if read_gold else gold_text(row[gold])
        check_choice(row, text)
        return asked(row, question), text

    return Form(name, (question, gold), read, beside=BESIDE)


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
    _posed("MATH with solutions", "problem", "solution", lambda row: last_boxed(row["solution"])),
    _posed("GSM8K", "question", "answer", _after_hashes),
    Form("chat", ("messages", "ground_truth"), _chat),
    *(
        make(f"{prompt} and {gold}", prompt, gold)
        for gold in ("gold", "ground_truth", "answer")
        for prompt, make in (("prompt", _whole), ("problem", _posed), ("question", _posed))
    ),
)


def load_questions(
    source: str, *, split: str = "train", limit: int | None = None, instruction: str | None = None
) -> list[Question]:
    """All questions of a data set, each problem once, in the order of their first row.

    source       a .jsonl, .json or .parquet file, or a hub name "owner/name[:config]"
    split        of a hub data set; a file is its own split
    limit        keep the first `limit` questions
    instruction  sentence added to every prompt that does not yet say how to mark the answer, for
                 example BOXED_INSTRUCTION

    ValueError for a missing file, unknown fields, or a prompt with a place for a picture that the
    row does not have; ConnectionError, within seconds, when the hub cannot be reached.
    """
    path = Path(source)
    rows: Iterable[Row]
    if path.suffix.lower() in FILE_SUFFIXES:
        rows = read_file(path)
    else:
        rows = read_hub(source, split)
    found = (to_question(row, path, i) for i, row in enumerate(rows))
    questions = unique_ids(merge_copies(found, source))[:limit]
    if not questions:
        raise ValueError(
            f"load_questions: {source} holds no question. Check the file or the split."
        )
    if instruction:
        questions = [_instructed(q, instruction) for q in questions]
    return questions


def to_question(row: Row, path: Path, number: int) -> Question:
    """Row `number` of the data set at `path`, as a Question.

    Columns may be written in capitals, as AIME's are, where no form knows them as they stand.
    """
    where = f"{path} row {number}"
    if _form_of(row) is None:
        row = {name.lower(): value for name, value in row.items()}
    form = _form_of(row)
    if form is None:
        known = "; ".join(f"{f.name} ({', '.join(f.fields)})" for f in FORMS)
        raise ValueError(
            f"load_questions: {path} has a row with the fields {sorted(row)} (row {number}); "
            f"expected one of: {known}. Rename the columns."
        )
    try:
        prompt, gold = form.read(row)
    except ValueError as error:
        raise ValueError(f"{error} ({where})") from None
    source = str(row.get("data_source") or path.stem)
    pictures = read_pictures(row, path.parent, where)
    images = tuple(pictures.values())
    if not form.reward:  # a program's task may well speak of a tag <image>
        prompt, images = place_pictures(prompt, pictures, where)
    identity = _row_id(row, source, prompt, images)
    return Question(identity, prompt, gold, source, _meta(row, form), images)


def _form_of(row: Row) -> Form | None:
    return next((f for f in FORMS if all(row.get(x) is not None for x in f.fields)), None)


def _row_id(row: Row, source: str, prompt: Prompt, images: Sequence[bytes | str]) -> str:
    """The row's own id where it has one, else a hash of the problem."""
    extra = row.get("extra_info") or {}
    if row.get("unique_id") is not None:
        return str(row["unique_id"])
    for value in (extra.get("index"), *(row.get(n) for n in ("id", "idx", "task_id"))):
        if value is not None:
            return f"{source}/{value}"
    return f"{source}/{_hash(prompt, images)}"


def _hash(prompt: Prompt, images: Sequence[bytes | str] = ()) -> str:
    digest = hashlib.sha256(json.dumps(prompt).encode())
    for image in images:
        digest.update(image if isinstance(image, bytes) else image.encode())
    return digest.hexdigest()[:16]


def _instructed(question: Question, instruction: str) -> Question:
    """Programming tasks say in their own prompt what is wanted."""
    if question.meta.get("reward"):
        return question
    return replace(question, prompt=with_instruction(question.prompt, instruction))


def _meta(row: Row, form: Form) -> dict[str, Any]:
    """The small fields that are left (level, subject, ...), and all of extra_info."""
    unread = {*form.fields, *form.beside, *image_columns(row)}
    left = {k: v for k, v in row.items() if k not in unread and _is_small(v)}
    extra = {k: v for k, v in (row.get("extra_info") or {}).items() if _is_small(v)}
    return {**left, **extra, **({"reward": form.reward} if form.reward else {})}


def _is_small(value: object) -> bool:
    if isinstance(value, str):
        return 0 < len(value) <= META_CHARACTERS
    return isinstance(value, (int, float))


def merge_copies(questions: Iterable[Question], source: str) -> list[Question]:
    """Each problem once, with meta["copies"]; problems with contradicting golds are dropped.

    Two sets of tests for one program do not contradict each other: the first row's are kept.
    """
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(_hash(question.prompt, question.images), []).append(question)
    agreed = [
        g
        for g in groups.values()
        if len({q.gold for q in g}) == 1 or g[0].meta.get("reward") == "code"
    ]
    if len(agreed) < len(groups):
        _log.warning(
            "%s: dropped %d problems whose copies have different answers",
            source,
            len(groups) - len(agreed),
        )
    return [replace(g[0], meta={**g[0].meta, "copies": len(g)}) for g in agreed]


def unique_ids(questions: Sequence[Question]) -> list[Question]:
    """Ids that clash get a hash of their problem, all of them, so that order does not matter."""
    seen = Counter(q.id for q in questions)
    return [
        q if seen[q.id] == 1 else replace(q, id=f"{q.id}#{_hash(q.prompt, q.images)}")
        for q in questions
    ]


def split_holdout(
    questions: Sequence[Question], count: int, seed: int
) -> tuple[list[Question], list[Question]]:
    """(training, held out): `count` questions chosen by a hash of seed and id, order kept.

    A question stays on its side when others are added, or the file is shuffled, as far as `count`
    allows. ValueError unless 0 <= count < len(questions).
    """
    if not 0 <= count < len(questions):
        raise ValueError(
            f"split_holdout: got count={count} of {len(questions)} questions; expected 0 to "
            f"{len(questions) - 1}. Lower eval_questions or give eval_data."
        )
    ranked = sorted(
        (q.id for q in questions), key=lambda i: hashlib.sha256(f"{seed}/{i}".encode()).digest()
    )
    held = set(ranked[:count])
    return [q for q in questions if q.id not in held], [q for q in questions if q.id in held]

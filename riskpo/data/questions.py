r"""Questions from a file or from the Hugging Face hub.

Local .jsonl, .json, .csv and .parquet files, also with .gz, are read directly; a column may mix
numbers and text. Any other name is a hub data set, "owner/name" or "owner/name:config". A row's
fields say what it means (riskpo/data/forms.py), or the column names that the user gives. A missing
value, or one that is neither text nor number, is refused with file and row.

Rows with the same problem become one question, since advantages group rewards by question and avg@n
weighs problems equally (the official AIME file holds 30 problems 32 times). meta["copies"] counts
them. A problem whose copies have different answers is dropped with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from riskpo.config import ColumnsConfig
from riskpo.data.files import is_file, read_file, read_hub
from riskpo.data.forms import Form, recognised, renamed
from riskpo.data.images import image_columns, place_pictures, read_pictures
from riskpo.data.prompts import ends_in_answer, with_instruction
from riskpo.data.values import Row, finite_number, mapping, missing, optional_text
from riskpo.types import Prompt, Question

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
META_CHARACTERS = 200
TOLERANCES = ("error", "precision", "tolerance")  # columns that are read by no reward of ours

_log = logging.getLogger(__name__)


def load_questions(
    source: str,
    *,
    split: str = "train",
    limit: int | None = None,
    instruction: str | None = None,
    columns: ColumnsConfig | None = None,
) -> list[Question]:
    """All questions of a data set, each problem once, in the order of their first row.

    source       a file or the name of a hub data set, as above
    split        split of a hub data set; ignored for a file
    limit        keep the first `limit` questions
    instruction  sentence, such as BOXED_INSTRUCTION, added to every prompt that does not yet say
                 how to mark the answer
    columns      names of the columns with question and gold, if no form matches

    ValueError, with file and row, for a missing file, unknown fields, a row that cannot be read, or
    a picture that is missing; ConnectionError, within seconds, when the hub cannot be reached.
    """
    rows: Iterable[tuple[str, Row]]
    if is_file(source):
        rows = read_file(Path(source).expanduser())
    else:
        rows = ((f"row {i}", row) for i, row in enumerate(read_hub(source, split), start=1))
    cut, loose = Counter[bool](), Counter[str]()

    def read() -> Iterable[Question]:
        for place, row in rows:
            yield to_question(row, Path(source), place, columns)
            cut[any(ends_in_answer(value) for value in row.values())] += 1
            loose[_tolerance(row)] += 1

    questions = unique_ids(merge_copies(read(), source))[:limit]
    if cut[True]:
        said = "%s: left out the assistant's last turn of %d rows: it is what is sampled"
        _log.warning(said, source, cut[True])
    for name in filter(None, loose):
        said = "%s: %d rows have a tolerance in the column %r; the built-in rewards compare exactly"
        _log.warning(said, source, loose[name], name)
    if not questions:
        raise ValueError(
            f"load_questions: {source} holds no question. Check the file or the split."
        )
    return [  # programming tasks say in their own prompt what is wanted
        replace(q, prompt=with_instruction(q.prompt, instruction))
        if instruction and not q.meta.get("reward")
        else q
        for q in questions
    ]


def _tolerance(row: Row) -> str:
    """The column in which a row allows answers that are near its gold; "" where it has none."""
    extra = row.get("extra_info")
    given = {**(extra if isinstance(extra, dict) else {}), **row}
    return next((name for name in TOLERANCES if not missing(given.get(name))), "")


# what reading a row of another shape than its form's raises, beside ValueError
_MISREAD = (KeyError, TypeError, AttributeError, IndexError, EOFError, zlib.error)


def to_question(
    row: object, path: Path, place: str, columns: ColumnsConfig | None = None
) -> Question:
    """The row at `place` of the data set at `path`, as a Question.

    Columns may be written in capitals, as AIME's are, where no form knows them as they stand.
    """
    where = f"{path} {place}"
    if not isinstance(row, dict):
        raise ValueError(
            f"load_questions: {where} holds {repr(row)[:60]}; expected an object with named "
            "columns. Write one object per row."
        )
    if columns is not None and columns.question:
        row, form = renamed(row, columns, where)
    else:
        row, form = recognised(row, where)
    source = path.name.partition(".")[0] if path.suffix == ".gz" else path.stem
    try:
        prompt, gold = form.read(row)
        source = optional_text(row, "data_source") or source
        identity = _row_id(row, source)
        meta = _meta(row, form)
    except (*_MISREAD, pickle.UnpicklingError) as error:
        raise ValueError(
            f"load_questions: the columns {', '.join(form.fields)} cannot be read as those of "
            f"{form.name}: {type(error).__name__}: {error}. Mend the row or drop it. ({where})"
        ) from None
    except ValueError as error:
        raise ValueError(f"{error} ({where})") from None
    pictures = read_pictures(row, path.parent, where)
    images = tuple(pictures.values())
    if not form.reward:  # a program's task may well speak of a tag <image>
        prompt, images = place_pictures(prompt, pictures, where)
    identity = identity or f"{source}/{_hash(prompt, images)}"
    return Question(identity, prompt, gold, source, meta, images)


def priors_of(questions: Iterable[Question], column: str | None) -> dict[str, float]:
    """By question id, the number in `column` of its row; {} without a column.

    ValueError where a row has no finite number there.
    """
    if column is None:
        return {}
    return {
        q.id: finite_number(q.meta.get(column), f"columns.prior: {column!r} of question {q.id!r}")
        for q in questions
    }


def _row_id(row: Row, source: str) -> str | None:
    """The row's own id; None without one."""
    if own := optional_text(row, "unique_id"):
        return own
    value = optional_text(mapping(row.get("extra_info"), "column 'extra_info'"), "index")
    value = value or optional_text(row, "id", "idx", "task_id")
    return value and f"{source}/{value}"


def _hash(prompt: Prompt, images: Sequence[bytes | str] = ()) -> str:
    digest = hashlib.sha256(json.dumps(prompt).encode())
    for image in images:
        digest.update(image if isinstance(image, bytes) else image.encode())
    return digest.hexdigest()[:16]


def _meta(row: Row, form: Form) -> dict[str, Any]:
    """The small fields that are left (level, subject, ...), and all of extra_info."""
    read = {*form.fields, *form.beside, *image_columns(row)}
    left = {k: v for k, v in row.items() if k not in read}
    extra = mapping(row.get("extra_info"), "column 'extra_info'")
    small = {k: v for part in (left, extra) for k, v in part.items() if _is_small(v)}
    return small | ({"reward": form.reward} if form.reward else {})


def _is_small(value: object) -> bool:
    if isinstance(value, str):
        return 0 < len(value) <= META_CHARACTERS
    return isinstance(value, (int, float)) and not missing(value)


def merge_copies(questions: Iterable[Question], source: str) -> list[Question]:
    """Each problem once, with meta["copies"]; a problem with different golds is dropped.

    Programming tasks keep the first row's tests: different tests do not contradict each other.
    """
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(_hash(question.prompt, question.images), []).append(question)
    code = {k for k, g in groups.items() if g[0].meta.get("reward") == "code"}
    agreed = [g for k, g in groups.items() if k in code or len({q.gold for q in g}) == 1]
    if len(agreed) < len(groups):
        said = "%s: dropped %d problems whose copies have different answers"
        _log.warning(said, source, len(groups) - len(agreed))
    return [replace(g[0], meta={**g[0].meta, "copies": len(g)}) for g in agreed]


def unique_ids(questions: Sequence[Question]) -> list[Question]:
    """Every id that occurs more than once gets a hash of its problem appended."""
    seen = Counter(q.id for q in questions)
    return [
        q if seen[q.id] == 1 else replace(q, id=f"{q.id}#{_hash(q.prompt, q.images)}")
        for q in questions
    ]


def split_holdout(
    questions: Sequence[Question], count: int, seed: int
) -> tuple[list[Question], list[Question]]:
    """(training, held out): `count` questions chosen by a hash of seed and id, order kept.

    Shuffling the file moves no question to the other side; adding some moves as few as possible.
    ValueError unless 0 <= count < len(questions).
    """
    if not 0 <= count < len(questions):
        raise ValueError(
            f"held out: got {count} of {len(questions)} questions; expected 0 to "
            f"{len(questions) - 1}, since training needs the rest. Lower eval_questions or give "
            "eval_data."
        )
    ranked = sorted(
        (q.id for q in questions), key=lambda i: hashlib.sha256(f"{seed}/{i}".encode()).digest()
    )
    held = set(ranked[:count])
    return [q for q in questions if q.id not in held], [q for q in questions if q.id in held]

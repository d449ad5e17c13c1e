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
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from riskpo.records import Question

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
IMAGE_FIELDS = ("images", "image", "decoded_image")
HUB_SECONDS = 3.0
META_CHARACTERS = 200

Row = dict[str, Any]
Prompt = str | list[dict[str, str]]
_log = logging.getLogger(__name__)


class Form(NamedTuple):
    """Rows that have all of `fields` are read by `read`: row -> (prompt, gold)."""

    name: str
    fields: tuple[str, ...]
    read: Callable[[Row], tuple[Prompt, str]]


def _verl(row: Row) -> tuple[Prompt, str]:
    return _messages(row["prompt"]), gold_text(row["reward_model"]["ground_truth"])


def _pair(prompt: str, gold: str) -> Callable[[Row], tuple[Prompt, str]]:
    return lambda row: (str(row[prompt]), gold_text(row[gold]))


def _gsm8k(row: Row) -> tuple[Prompt, str]:
    """Without "####" the answer is the gold itself."""
    answer = gold_text(row["answer"])
    if "####" in answer:
        answer = answer.rpartition("####")[2].strip().replace(",", "")
    return str(row["question"]), answer


def _solution(row: Row) -> tuple[Prompt, str]:
    return str(row["problem"]), last_boxed(row["solution"])


def _chat(row: Row) -> tuple[Prompt, str]:
    return _messages(row["messages"]), gold_text(row["ground_truth"])


FORMS = (
    Form("verl", ("prompt", "reward_model"), _verl),
    Form("OlympiadBench", ("question", "final_answer"), _pair("question", "final_answer")),
    Form("MATH", ("problem", "answer"), _pair("problem", "answer")),
    Form("MATH with solutions", ("problem", "solution"), _solution),
    Form("GSM8K", ("question", "answer"), _gsm8k),
    Form("chat", ("messages", "ground_truth"), _chat),
    *(
        Form(f"{prompt} and {gold}", (prompt, gold), _pair(prompt, gold))
        for gold in ("gold", "ground_truth", "answer")
        for prompt in ("prompt", "problem", "question")
    ),
)


def load_questions(
    source: str, *, split: str = "train", limit: int | None = None, instruction: str | None = None
) -> list[Question]:
    """All questions of a data set, each problem once, in the order of their first row.

    source       a .jsonl, .json or .parquet file, or a hub name "owner/name[:config]"
    split        of a hub data set; a file is its own split
    limit        keep the first `limit` questions
    instruction  sentence added to every prompt that does not mention \\boxed yet, for example
                 BOXED_INSTRUCTION

    ValueError for a missing file, unknown fields or image rows; ConnectionError, within seconds,
    when the hub cannot be reached.
    """
    path = Path(source)
    rows: Iterable[Row]
    if path.suffix.lower() in FILE_SUFFIXES:
        rows = _read_file(path)
    else:
        rows = _read_hub(source, split)
    found = (to_question(row, path.stem) for row in rows)
    questions = unique_ids(merge_copies(found, source))[:limit]
    if not questions:
        raise ValueError(
            f"load_questions: {source} holds no question. Check the file or the split."
        )
    if instruction:
        questions = [replace(q, prompt=with_instruction(q.prompt, instruction)) for q in questions]
    return questions


def to_question(row: Row, source: str) -> Question:
    """One row as a Question; `source` names the data set where the row does not."""
    images = [name for name in IMAGE_FIELDS if row.get(name)]
    if images:
        raise ValueError(
            f"load_questions: {source} has image rows (field {images[0]!r}), which are not "
            "supported yet. Drop these rows or choose a text data set."
        )
    form = next((f for f in FORMS if all(row.get(x) is not None for x in f.fields)), None)
    if form is None:
        known = "; ".join(f"{f.name} ({', '.join(f.fields)})" for f in FORMS)
        raise ValueError(
            f"load_questions: {source} has a row with the fields {sorted(row)}; expected one of: "
            f"{known}. Rename the columns."
        )
    prompt, gold = form.read(row)
    source = str(row.get("data_source") or source)
    return Question(_row_id(row, source, prompt), prompt, gold, source, _meta(row, form))


def _row_id(row: Row, source: str, prompt: Prompt) -> str:
    """The row's own id where it has one, else a hash of the problem."""
    extra = row.get("extra_info") or {}
    if row.get("unique_id") is not None:
        return str(row["unique_id"])
    for value in (extra.get("index"), row.get("id"), row.get("idx")):
        if value is not None:
            return f"{source}/{value}"
    return f"{source}/{_hash(prompt)}"


def _hash(prompt: Prompt) -> str:
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:16]


def _meta(row: Row, form: Form) -> dict[str, Any]:
    """The small fields that are left (level, subject, ...), and all of extra_info."""
    left = {k: v for k, v in row.items() if k not in form.fields and _is_small(v)}
    extra = {k: v for k, v in (row.get("extra_info") or {}).items() if _is_small(v)}
    return {**left, **extra}


def _is_small(value: object) -> bool:
    if isinstance(value, str):
        return 0 < len(value) <= META_CHARACTERS
    return isinstance(value, (int, float))


def _messages(value: Any) -> Prompt:
    """A list of {"role", "content"}; some files store it as JSON text, some as plain text."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return value
        value = json.loads(value)
    return [{"role": str(m["role"]), "content": str(m["content"])} for m in value]


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


def merge_copies(questions: Iterable[Question], source: str) -> list[Question]:
    """Each problem once, with meta["copies"]; problems with contradicting golds are dropped."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(json.dumps(question.prompt), []).append(question)
    agreed = [g for g in groups.values() if len({q.gold for q in g}) == 1]
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
    return [q if seen[q.id] == 1 else replace(q, id=f"{q.id}#{_hash(q.prompt)}") for q in questions]


def with_instruction(prompt: Prompt, instruction: str) -> Prompt:
    """The instruction after the text or the last message; left alone where \\boxed is asked for."""
    if "\\boxed" in json.dumps(prompt):
        return prompt
    if isinstance(prompt, str):
        return f"{prompt}\n{instruction}"
    last = {**prompt[-1], "content": f"{prompt[-1]['content']}\n{instruction}"}
    return [*prompt[:-1], last]


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


def _read_file(path: Path) -> list[Row]:
    if not path.is_file():
        raise ValueError(f"load_questions: there is no file {path}. Check the path.")
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.read_table(path).to_pylist())
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() == ".json":
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise ValueError(
                f"load_questions: {path} holds a {type(rows).__name__}; expected a list of rows. "
                "Write one row per line into a .jsonl file."
            )
        return rows
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _read_hub(source: str, split: str) -> Iterable[Row]:
    import datasets
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    if not Path(source).exists() and not offline and not _hub_answers():
        raise ConnectionError(
            f"load_questions: the hub ({constants.ENDPOINT}) did not answer within "
            f"{HUB_SECONDS:.0f} s, so {source!r} cannot be loaded. Give a local .jsonl or .parquet "
            "file, or set HF_HUB_OFFLINE=1 to use a copy from the cache."
        )
    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        kind = ConnectionError if offline or isinstance(error, ConnectionError) else ValueError
        raise kind(
            f"load_questions: cannot load {source!r}, split {split!r}"
            f"{' (HF_HUB_OFFLINE is set)' if offline else ''}: {reason}. Check the name, or give a "
            "local .jsonl or .parquet file."
        ) from None  # one line; the reason is in it


def _hub_answers() -> bool:
    """One request with a short limit, proxies respected; the libraries retry for 23 s and more."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answered, done = threading.Event(), threading.Event()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
            answered.set()
        except Exception as error:  # any reason means the same: no hub
            _log.debug("hub: %s", error)
        finally:
            done.set()

    threading.Thread(
        target=ask, daemon=True
    ).start()  # name resolution has no time limit of its own
    done.wait(HUB_SECONDS)
    return answered.is_set()

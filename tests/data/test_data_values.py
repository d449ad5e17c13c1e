"""Values of every type in every field, in every format of file: right, or named and refused."""

from __future__ import annotations

import csv
import gzip
import json
import logging
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from riskpo.config import ColumnsConfig, TrainConfig, validate
from riskpo.data.questions import load_questions

USER = {"role": "user", "content": "How many?"}
SYSTEM = {"role": "system", "content": "Think."}
ANSWER = {"role": "assistant", "content": "It is 34."}
NAN = float("nan")
BAD = {
    "null": None, "NaN": NAN, "infinity": float("inf"), "true": True, "object": {"a": 1},
    "empty list": [], "list of nulls": [None], "nested list": [["1"]], "blank": " ",
    "surrogate": "\ud800",
}  # fmt: skip


def load(tmp_path, *rows, name="set.jsonl", **options):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_questions(str(path), **options)


def chat(prompt, gold="34"):
    return {"prompt": prompt, "reward_model": {"ground_truth": gold}}


GOLDS = {
    "GSM8K": lambda v: {"question": "q", "answer": v},
    "MATH": lambda v: {"problem": "q", "answer": v},
    "MATH with solutions": lambda v: {"problem": "q", "solution": v},
    "OlympiadBench": lambda v: {"question": "q", "final_answer": v},
    "verl": lambda v: chat([USER], v),
    "chat": lambda v: {"messages": [USER], "ground_truth": v},
    "plain": lambda v: {"prompt": "q", "gold": v},
}
PROMPTS = {
    "GSM8K": lambda v: {"question": v, "answer": "1"},
    "MATH": lambda v: {"problem": v, "answer": "1"},
    "verl": chat,
    "chat": lambda v: {"messages": v, "ground_truth": "1"},
    "plain": lambda v: {"prompt": v, "gold": "1"},
    "MBPP": lambda v: {"text": v, "test_list": ["assert f() == 1"]},
    "HumanEval": lambda v: {"task_id": 1, "prompt": v, "entry_point": "f", "test": "0"},
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("form", GOLDS)
def test_a_gold_that_is_no_text_is_refused_with_its_line(tmp_path, form, bad):
    good = GOLDS[form]("\\boxed{1}")
    with pytest.raises(ValueError, match=r"set.jsonl line 2\b") as caught:
        load(tmp_path, good, GOLDS[form](BAD[bad]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [*BAD, "list of texts", "list of numbers"])
@pytest.mark.parametrize("form", PROMPTS)
def test_a_prompt_that_is_no_text_is_refused_with_its_line(tmp_path, form, bad):
    value = {"list of texts": ["q", "r"], "list of numbers": [1, 2]}.get(bad, BAD.get(bad))
    with pytest.raises(ValueError, match=r"set.jsonl line 2\b"):
        load(tmp_path, PROMPTS[form]("first"), PROMPTS[form](value))


@pytest.mark.parametrize("bad", [[1], {"a": [2]}, True])
@pytest.mark.parametrize(
    "column", ["id", "unique_id", "data_source", "extra_info", "context", "choices"]
)
def test_a_value_beside_them_is_refused_too(tmp_path, column, bad):
    row = {"question": "q", "answer": "1", column: bad}
    if column == "extra_info" and bad == {"a": [2]} or column == "choices" and bad == [1]:
        row["answer"] = "A"
        assert load(tmp_path, row)
        return
    with pytest.raises(ValueError, match=r"set.jsonl line 1\b"):
        load(tmp_path, row)


def test_missing_values_beside_them_are_no_values(tmp_path):
    beside = dict.fromkeys(("id", "unique_id", "data_source", "extra_info", "context", "choices"))
    plain = load(tmp_path, {"question": "q", "answer": "1"})
    for nothing in (None, NAN):
        assert load(
            tmp_path, {"question": "q", "answer": "1", **dict.fromkeys(beside, nothing)}
        ) == (plain)
    told = {"question": "q", "answer": 3, "id": 7.0, "extra_info": '{"split": "x"}'}
    (question,) = load(tmp_path, told)
    assert (question.id, question.meta["split"], question.gold) == ("set/7", "x", "3")


@pytest.mark.parametrize("row", [None, 3, "text", [1], True])
def test_a_row_that_is_no_object(tmp_path, row):
    with pytest.raises(ValueError, match="set.jsonl line 2 holds"):
        load(tmp_path, {"question": "q", "answer": "1"}, row)


# Messages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [f for f in PROMPTS if f not in ("MBPP", "HumanEval")])
@pytest.mark.parametrize("write", [list, json.dumps, str], ids=["list", "json", "python"])
def test_a_list_of_messages_is_a_chat_in_every_form(tmp_path, form, write, caplog):
    """It was trained as the repr of a list; with the answer's turn, as the answer itself."""
    (question,) = load(tmp_path, PROMPTS[form](write([SYSTEM, USER])))
    assert question.prompt == [SYSTEM, USER]
    with caplog.at_level(logging.WARNING):
        (question,) = load(tmp_path, PROMPTS[form](write([SYSTEM, USER, ANSWER])))
    assert question.prompt == [SYSTEM, USER] and "last turn of 1 rows" in caplog.text
    middle = [USER, ANSWER, {"role": "user", "content": "Sure?"}]
    assert load(tmp_path, PROMPTS[form](write(middle)))[0].prompt == middle


@pytest.mark.parametrize(
    "turns",
    [
        [ANSWER], [SYSTEM], [{"role": "user"}], [{"content": "q"}], [{"role": 1, "content": "q"}],
        [{"role": "user", "content": None}], [{"role": "user", "content": {"a": 1}}], ["q"],
        [{"role": "user", "content": [{"type": "text"}]}], [{"from": "human", "value": "q"}],
        [{"role": "user", "content": [{"type": "audio", "text": "x"}]}], [USER, None],
        "[{'role': 'user', 'content': 'How many?'}\n {'role': 'user', 'content': 'q'}]",
    ],
)  # fmt: skip
def test_messages_that_are_none_are_refused(tmp_path, turns):
    for form in ("verl", "chat", "plain"):
        with pytest.raises(ValueError, match=r"set.jsonl line 1\b"):
            load(tmp_path, PROMPTS[form](turns))


@pytest.mark.parametrize(
    "text", ["[1, 2, 3] has how many elements?", "[asy] draw(); [/asy]", "[", "[{", '[{"a": 1}]?']
)
def test_text_that_begins_like_a_list_is_text(tmp_path, text):
    for form in ("verl", "chat", "plain", "GSM8K"):
        assert load(tmp_path, PROMPTS[form](text))[0].prompt == text


def test_choices_follow_the_last_message(tmp_path):
    (question,) = load(tmp_path, {"question": [USER], "options": ["3", "4"], "answer": "B"})
    assert question.prompt == [{"role": "user", "content": "How many?\n(A) 3\n(B) 4"}]


# Files -----------------------------------------------------------------------------------------

ROWS = [{"question": '1, "2"\n3?', "answer": "1"}, {"question": "é?", "answer": "2"}]


def write_table(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_every_format_gives_the_same_questions(tmp_path):
    texts = {"jsonl": "\n".join(map(json.dumps, ROWS)), "json": json.dumps(ROWS)}
    for kind, text in texts.items():
        (tmp_path / f"set.{kind}").write_bytes(b"\xef\xbb\xbf" + text.encode())  # Windows' mark
    write_table(tmp_path / "set.csv", ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "set.parquet")
    for kind in ("jsonl", "json", "csv"):
        path = tmp_path / f"set.{kind}"
        (tmp_path / f"set.{kind}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    found = [load_questions(str(path)) for path in sorted(tmp_path.iterdir())]
    assert len(found) == 7 and all(q == found[0] for q in found)
    assert [(q.prompt, q.gold) for q in found[0]] == [(r["question"], r["answer"]) for r in ROWS]


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("set.jsonl", b'{"question": "q", "answer": "1"}\n{"quest', "set.jsonl line 2 is not"),
        ("set.jsonl", b'[\n{"question": "q", "answer": "1"}\n]', "set.jsonl line 1 is not JSON"),
        ("set.json", b'{"question": "q", "answer": "1"}\n{}', "set.json is not JSON.*jsonl"),
        ("set.json", b'[{"question": "q", "answer": "1"}, 3]', "set.json row 2 holds 3"),
        ("set.csv", b'question,answer\nq,1\nq,1,2\n', "set.csv line 3 has more fields"),
        ("set.csv", b'question,answer\nq,1\nr\n', "set.csv line 3 has nothing in.*'answer'"),
        ("set.csv", b'question,answer\nq,1\n"r', "set.csv cannot be read after line 2"),
        ("set.csv", b'a,b\nq,1\n', r"set.csv line 2 has the fields \['a', 'b'\].*columns.question"),
        ("set.jsonl", b'{"question": "\xff", "answer": "1"}', "set.jsonl cannot be read.*UTF-8"),
        ("set.jsonl.gz", b"no gzip", "set.jsonl.gz cannot be read after its beginning"),
        ("set.jsonl.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], "set.jsonl.gz "),
        ("set.parquet", b"PAR1 nothing", "set.parquet cannot be read as parquet after row 0"),
        ("set.tsv", b"question\tanswer\nq\t1\n", "expected a file that ends in .jsonl"),
        ("set.xlsx", b"", "expected a file that ends in .jsonl"),
        ("set.csv", b"", "set.csv holds no question"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_with_the_place(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=named) as caught:
        load_questions(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_numbers_of_a_parquet_file(tmp_path):
    rows = [{"question": "q", "answer": Decimal("2.50")}, {"question": "r", "answer": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    assert load_questions(str(tmp_path / "a.parquet"))[0].gold == "2.5"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet row 2 has nothing in the column 'answer'"):
        load_questions(str(tmp_path / "a.parquet"))


# Names of columns -------------------------------------------------------------------------------


def test_columns_by_name(tmp_path):
    row = {"body": "q", "reply": {"value": "so\n#### 1,234"}, "key": 7, "answer": "no", "note": "n"}
    columns = ColumnsConfig(question="body", gold="reply.value", id="key")
    (question,) = load(tmp_path, row, columns=columns)
    assert (question.prompt, question.gold, question.id) == ("q", "1234", "7")
    assert question.meta["note"] == "n"
    with pytest.raises(ValueError, match="line 1 has nothing in the column 'text'.*columns are"):
        load(tmp_path, row, columns=ColumnsConfig(question="text", gold="reply"))
    with pytest.raises(ValueError, match=r"set.jsonl line 1\b"):
        load(tmp_path, row, columns=ColumnsConfig(question="body", gold="reply"))
    with pytest.raises(ValueError, match="columns.question='x' with columns.gold=None"):
        validate(TrainConfig(columns=ColumnsConfig(question="x")))


def test_a_tolerance_in_the_data_is_named(tmp_path, caplog):
    """No reward of ours reads it: in silence a row would be judged otherwise than it says."""
    rows = [
        {"question": "q", "answer": "1", "error": "1e-2"},
        {"question": "r", "answer": "2", "error": None},
        {"question": "s", "answer": "3", "extra_info": {"precision": 2}},
    ]
    path = tmp_path / "loose.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING):
        assert len(load_questions(str(path))) == 3
    said = [r.message for r in caplog.records if "compare exactly" in r.message]
    assert len(said) == 2 and "1 rows have a tolerance in the column 'error'" in said[0]

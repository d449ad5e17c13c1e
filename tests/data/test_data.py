"""Every known form of row becomes the right Question, and nothing is guessed."""

import base64
import json
import logging
import pickle
import time
import zlib

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants

from riskpo.config import RunConfig
from riskpo.data.boxes import last_boxed
from riskpo.data.prompts import gold_text
from riskpo.data.questions import BOXED_INSTRUCTION, load_questions, split_holdout
from riskpo.rewards.scorer import Scorer
from riskpo.run import load_data
from riskpo.types import Question

VERL = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "How many?"}],
    "reward_model": {"style": "rule", "ground_truth": "34"},
    "extra_info": {"index": 7, "split": None},
}


def load(tmp_path, *rows, **options):
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_questions(str(path), **options)


@pytest.mark.parametrize(
    "row, prompt, gold, identity",
    [
        ({"question": "q", "answer": "so 2*3\n#### 1,234"}, "q", "1234", None),
        ({"question": "q", "answer": "so\n#### $1,234,567.89"}, "q", "$1234567.89", None),
        ({"question": "q", "answer": "so\n#### 3,5"}, "q", "3,5", None),
        ({"question": "q", "answer": "so\n#### 10,20,1234"}, "q", "10,20,1234", None),
        ({"question": "q", "answer": "B"}, "q", "B", None),
        (VERL, VERL["prompt"], "34", "math_dapo/7"),
        ({"problem": "q", "answer": "\\frac12", "unique_id": "t/8"}, "q", "\\frac12", "t/8"),
        ({"problem": "q", "answer": 27.0, "id": 3, "question": "q"}, "q", "27", "set/3"),
        ({"problem": "q", "solution": "\\boxed{1} \\boxed{\\frac13}"}, "q", "\\frac13", None),
        ({"question": "q", "final_answer": ["$2$", "$3$"], "id": 5}, "q", "2, 3", "set/5"),
        ({"prompt": "q", "answer": 70}, "q", "70", None),
        (
            {"prompt": "q", "messages": '[{"role": "user", "content": "q"}]', "ground_truth": "1"},
            [{"role": "user", "content": "q"}],
            "1",
            None,
        ),
        ({"prompt": "q", "gold": "1", "id": "x"}, "q", "1", "set/x"),
        ({"ID": "2024-I-4", "Problem": "q", "Solution": "s", "Answer": 33}, "q", "33",
         "set/2024-I-4"),
    ],
)  # fmt: skip
def test_each_form_of_row(tmp_path, row, prompt, gold, identity):
    (question,) = load(tmp_path, row)
    assert (question.prompt, question.gold) == (prompt, gold)
    assert question.id == identity or (identity is None and question.id.startswith("set/"))
    assert question.source == row.get("data_source", "set")
    assert load(tmp_path, row) == [question]


def test_small_fields_are_kept_for_rewards_and_curves(tmp_path):
    (question,) = load(tmp_path, {"problem": "q", "answer": "1", "level": 2, "notes": "x" * 500})
    assert question.meta == {"level": 2, "copies": 1}


def test_unknown_fields_are_refused_with_what_is_known(tmp_path):
    with pytest.raises(ValueError, match=r"\['body', 'reply'\].*GSM8K \(question, answer\)"):
        load(tmp_path, {"body": "q", "reply": "1"})
    with pytest.raises(ValueError, match="without a .boxed answer"):
        load(tmp_path, {"problem": "q", "solution": "it is 5"})
    with pytest.raises(ValueError, match="no question"):
        load(tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        load_questions(str(tmp_path / "absent.jsonl"))


LIVECODEBENCH = {  # the columns of code_generation_lite
    "question_title": "Sum",
    "question_content": "Add two numbers.",
    "platform": "atcoder",
    "question_id": "abc1_a",
    "contest_id": "abc1",
    "contest_date": "2024-01-01T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]),
    "private_test_cases": base64.b64encode(
        zlib.compress(
            pickle.dumps(json.dumps([{"input": "4 5", "output": "9", "testtype": "stdin"}]))
        )
    ).decode(),
    "metadata": "{}",
}


def test_a_row_of_livecodebench_in_its_own_form(tmp_path):
    (question,) = load(tmp_path, LIVECODEBENCH, instruction=BOXED_INSTRUCTION)
    assert question.prompt.startswith("Add two numbers.\n\nWrite a Python program")
    assert "boxed" not in question.prompt and question.meta["reward"] == "code"
    assert question.meta["difficulty"] == "easy"
    tests = [("1 2", "3"), ("4 5", "9")]
    gold = json.loads(question.gold)
    assert gold["kind"] == "stdin"
    assert [(t["input"], t["output"]) for t in gold["tests"]] == tests
    called = {
        **LIVECODEBENCH,
        "starter_code": "class Solution:\n    def add(self, a, b):",
        "public_test_cases": json.dumps(
            [{"input": "1\n2", "output": "3", "testtype": "functional"}]
        ),
        "private_test_cases": "[]",
        "metadata": '{"func_name": "add"}',
    }
    (question,) = load(tmp_path, called)
    assert "def add(self, a, b):" in question.prompt
    assert "Solution().add(1, 2)" in json.loads(question.gold)["tests"]


def test_an_error_in_a_row_names_it(tmp_path):
    bad = {"problem": "q", "solution": "it is 5"}
    with pytest.raises(ValueError, match=r"without a .boxed answer.*set.jsonl line 2\)"):
        load(tmp_path, {"problem": "q", "answer": "1"}, bad)


def test_copies_become_one_question_and_contradictions_none(tmp_path, caplog):
    rows = [{"prompt": p, "answer": a} for p, a in (("a", "1"), ("b", "2"), ("a", "1"), ("b", "3"))]
    with caplog.at_level(logging.WARNING):
        questions = load(tmp_path, *rows)
    assert [(q.prompt, q.meta["copies"]) for q in questions] == [("a", 2)]
    assert "dropped 1 problems" in caplog.text


def test_ids_are_unique_and_do_not_depend_on_the_order(tmp_path):
    rows = [{"id": 1, "prompt": "a", "answer": 1}, {"id": 1, "prompt": "b", "answer": 1}]
    forward, backward = load(tmp_path, *rows), load(tmp_path, *rows[::-1])
    assert len({q.id for q in forward}) == 2
    assert {(q.id, q.prompt) for q in forward} == {(q.id, q.prompt) for q in backward}


def test_instruction_is_added_once(tmp_path):
    asked = {"prompt": "q, in \\boxed{}", "answer": 1}
    rows = [{"prompt": "q", "answer": 1}, asked, VERL]
    plain, already, chat = load(tmp_path, *rows, instruction=BOXED_INSTRUCTION)
    assert plain.prompt == f"q\n{BOXED_INSTRUCTION}" and already.prompt == asked["prompt"]
    assert chat.prompt[-1]["content"].endswith(BOXED_INSTRUCTION)
    assert load(tmp_path, *rows)[0].id == plain.id
    assert VERL["prompt"][0]["content"] == "How many?"


def test_json_and_parquet_files(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([VERL]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([VERL]), tmp_path / "a.parquet")
    assert load_questions(str(tmp_path / "a.json")) == load_questions(str(tmp_path / "a.parquet"))
    (tmp_path / "b.json").write_text('{"data": []}')
    with pytest.raises(ValueError, match="expected a list of rows"):
        load_questions(str(tmp_path / "b.json"))


def test_gold_text_and_last_boxed():
    assert gold_text(1e23) == "1" + 23 * "0" and gold_text(-0.0) == "0"
    assert [gold_text(x) for x in (27.0, 2.5, 7, "023", ["1", 2.0])] == [
        "27",
        "2.5",
        "7",
        "023",
        "1, 2",
    ]
    for inside in (r"\{1, 2\}", r"\left\{ x \right.", r"\begin{matrix} 1 \\{2} \end{matrix}"):
        assert last_boxed(rf"\boxed{{1}}, so \boxed{{{inside}}}.") == inside
    assert last_boxed(r"it is $\boxed 5$ of \frac{1}{2}") == "5"


def test_holdout_is_stable():
    questions = [Question(str(i), "p", "1") for i in range(50)]
    train, held = split_holdout(questions, 10, seed=0)
    assert (len(train), len(held)) == (40, 10) and not {q.id for q in train} & {q.id for q in held}
    assert {q.id for q in split_holdout(questions[::-1], 10, seed=0)[1]} == {q.id for q in held}
    assert split_holdout(questions, 10, seed=1)[1] != held
    assert split_holdout(questions, 0, seed=0) == (questions, [])
    with pytest.raises(ValueError, match="held out: got 50 of 50"):
        split_holdout(questions, 50, seed=0)


@pytest.mark.parametrize("asked, held", [(0, 0), (2, 2), (3, 3), (200, 3)])
def test_a_file_of_its_own_is_held_out_to_its_last_question(tmp_path, asked, held):
    for name, rows in ("train", 5), ("held", 3):
        lines = (f'{{"question": "{name} {i}", "answer": "{i}"}}' for i in range(rows))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = {"data": str(tmp_path / "train.jsonl"), "eval_data": str(tmp_path / "held.jsonl")}
    training, chosen = load_data(RunConfig(**files, eval_questions=asked))
    assert (len(training), len(chosen)) == (5, held)
    assert all("held" in q.prompt for q in chosen)


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_out_of_reach_is_one_clear_line_at_once(monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    import datasets  # noqa: F401  its import may take seconds and is not what is timed here

    start = time.monotonic()
    with pytest.raises(ConnectionError, match="no-owner/no-such-set") as caught:
        load_questions("no-owner/no-such-set")
    assert "\n" not in str(caught.value) and "local .jsonl" in str(caught.value)
    assert time.monotonic() - start < 10  # without the check 23 s of retries


ROWS = {  # file -> questions, one gold
    "problems/gsm8k_train.jsonl": (2000, "72"),
    "problems/gsm8k_test.jsonl": (300, None),
    "problems/math500.jsonl": (250, "\\left( 3, \\frac{\\pi}{2} \\right)"),
    "problems/aime24.jsonl": (15, "204"),
    "problems/aime25.jsonl": (15, "70"),
    "problems/amc23.jsonl": (20, "45"),
    "problems/minerva_math.jsonl": (136, None),
    "problems/olympiadbench_oe_maths_en.jsonl": (338, "2"),
    "verl/dapo_math_17k_svs_first200.jsonl": (196, "34"),
    "verl/dapo_math_17k_svs.parquet": (1170, "34"),
    "verl/math_train_lighteval.parquet": (1500, "0"),
    "code/humaneval.jsonl": (82, None),
    "code/mbpp.jsonl": (250, None),
    "code/leetcode_functional.jsonl": (60, None),
    "code/codeforces_stdin.jsonl": (100, None),
}


def test_every_adapter_reads_its_real_file(shared_data):
    for name, (count, gold) in ROWS.items():
        questions = load_questions(str(shared_data / name))
        assert len(questions) == count, name
        assert gold is None or gold in {questions[0].gold}, (name, questions[0].gold)
        assert all(q.gold and q.prompt for q in questions), name
        is_code = name.startswith("code/")
        assert all((q.meta.get("reward") == "code") == is_code for q in questions), name


BAD_GOLDS = {"deepmath_roll": 0, "minerva_math": 3, "olympiadbench_oe_maths_en": 2}


def test_real_files_load_and_their_golds_verify_against_themselves(shared_data):
    files = [*(shared_data / "problems").glob("*"), *(shared_data / "verl").glob("*")]
    assert files
    with Scorer("math", seconds=20) as scorer:
        for path in files:
            questions = load_questions(str(path), limit=100)
            assert len({q.id for q in questions}) == len(questions)
            bad = scorer.check_golds(questions)
            assert len(bad) <= BAD_GOLDS.get(path.stem, 0), [(q.gold, v) for q, v in bad]

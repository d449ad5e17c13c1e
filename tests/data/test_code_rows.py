"""The code reward on real rows: references pass, a weak model's programs hang nothing."""

import json
from collections import Counter

import pytest

from riskpo.data.questions import load_questions
from riskpo.rewards.code import last_block, verify_code
from riskpo.rewards.scorer import Outcome, Scorer
from tests.isolation import needs_sandbox
from tests.rewards.test_code_reward import outcome
from tests.toy import scored


@needs_sandbox
@pytest.mark.parametrize(
    "name, count", [("humaneval", 10), ("mbpp", 12), ("leetcode_functional", 8)]
)
def test_reference_solutions_of_real_rows_pass(shared_data, name, count):
    questions = load_questions(str(shared_data / "code" / f"{name}.jsonl"))
    chosen = questions[:: max(1, len(questions) // count)]
    with Scorer("code", workers=2, seconds=10) as scorer:
        assert scorer.check_golds(chosen) == []


@needs_sandbox
def test_real_completions_of_a_weak_model_hang_nothing(shared_data):
    path = shared_data / "code" / "humaneval_codegen16b_completions_x12.jsonl"
    tasks = {
        q.id.partition("/")[2]: q
        for q in load_questions(str(shared_data / "code" / "humaneval.jsonl"))
    }
    rows = [json.loads(line) for line in path.read_text().splitlines()][::35]
    with Scorer("code", workers=2, seconds=3) as scorer:
        _, counts = scored(
            scorer, [row["completion"] for row in rows], [tasks[row["task_id"]] for row in rows]
        )
    assert sum(counts.values()) == len(rows) and counts["crash"] == counts["unparsable_gold"] == 0
    assert counts["right"] and counts["wrong"]


def test_the_last_block_is_what_a_public_grader_took(shared_data):
    path = shared_data / "code" / "livecodebench_o1mini_graded.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    seen = Counter(
        (last_block(row["output_list"][0]) or "").strip() == row["code_list"][0].strip()
        for row in rows
    )
    assert seen[False] == 0, seen


TIMUR = """
from bisect import bisect_right
for _ in range(int(input())):
    n, k, q = map(int, input().split())
    a, b = ([0, *map(int, input().split())] for _ in range(2))
    answers = []
    for _ in range(q):
        d = int(input())
        i = min(bisect_right(a, d) - 1, k - 1)
        answers.append(b[i] + (d - a[i]) * (b[i + 1] - b[i]) // (a[i + 1] - a[i]))
    print(*answers)
"""


@needs_sandbox
def test_real_stream_rows(shared_data):
    questions = load_questions(str(shared_data / "code" / "codeforces_stdin.jsonl"))
    assert len(questions) == 100
    for question in questions:  # the rows bring no solutions
        assert verify_code(None, question).outcome is Outcome.RIGHT
    assert "Timur is in a car" in questions[0].prompt
    assert outcome(questions[0].gold, TIMUR) == "right"
    assert outcome(questions[0].gold, TIMUR.replace("// (", "/ (")) == "wrong"
    assert outcome(questions[1].gold, TIMUR) == "wrong"

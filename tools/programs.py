"""How programs fare in the sandbox, file by file: python -m tools.programs FOLDER

FOLDER holds the .jsonl files of programming tasks; each table row is one of them:

  references   the row's own solution against the row's tests: all have to be right
  wrong line   rows without a solution, a program that prints nobody's answer: all have to be wrong
  completions  {task_id, completion} rows of a model, unlabelled, against the task's tests
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from riskpo.data.questions import load_questions
from riskpo.rewards.scorer import Scorer
from riskpo.rewards.verdict import OUTCOMES, Outcome, tally
from riskpo.types import Question
from tools.agreement import heading, line

TASKS = ("humaneval", "mbpp", "leetcode_functional", "codeforces_stdin")
UNSOLVED = "codeforces_stdin"
WRONG_LINE = "```python\nprint('~')\n```"
COMPLETIONS = "humaneval_codegen16b_completions_x12"


def references(scorer: Scorer, questions: list[Question]) -> Counter[str]:
    """Outcomes of the solutions; where a row has none its tests are only read."""
    bad = scorer.check_golds(questions)
    counts = Counter(verdict.outcome.value for _, verdict in bad)
    counts[Outcome.RIGHT.value] = len(questions) - len(bad)
    for question, verdict in bad:
        print(f"  {question.id}: {verdict.outcome.value}, {verdict.detail}")
    return counts


def completions(scorer: Scorer, path: Path, tasks: list[Question]) -> Counter[str]:
    known = {task.id.partition("/")[2]: task for task in tasks}
    rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    chosen = [known[r["task_id"]] for r in rows]
    return Counter(tally(scorer.verdicts([r["completion"] for r in rows], chosen)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="holds the .jsonl files")
    parser.add_argument("--workers", type=int, default=2, help="programs at a time")
    parser.add_argument("--seconds", type=float, default=10.0, help="for all tests of a program")
    options = parser.parse_args()
    heading("programs", "rows", *OUTCOMES, "seconds")
    with Scorer("code", workers=options.workers, seconds=options.seconds) as scorer:
        for name in TASKS:
            start = time.monotonic()
            questions = load_questions(str(options.folder / f"{name}.jsonl"))
            counts = references(scorer, questions)
            spent = f"{time.monotonic() - start:.0f}"
            line(name, len(questions), *(counts[side] for side in OUTCOMES), spent)
        start = time.monotonic()
        questions = load_questions(str(options.folder / f"{UNSOLVED}.jsonl"))
        counts = Counter(tally(scorer.verdicts([WRONG_LINE] * len(questions), questions)))
        spent = f"{time.monotonic() - start:.0f}"
        line(f"{UNSOLVED}, wrong line", sum(counts.values()), *(counts[x] for x in OUTCOMES), spent)
        start = time.monotonic()
        tasks = load_questions(str(options.folder / "humaneval.jsonl"))
        counts = completions(scorer, options.folder / f"{COMPLETIONS}.jsonl", tasks)
        spent = f"{time.monotonic() - start:.0f}"
        seen = [counts[side] for side in OUTCOMES]
        line(COMPLETIONS, sum(seen), *seen, spent)


if __name__ == "__main__":
    main()

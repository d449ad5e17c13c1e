"""Agreement of the rewards with labelled data, file by file: python -m tools.agreement FOLDER

FOLDER may hold three folders; each gives one table.

  labelled_outputs/*.jsonl  {id, problem, gold, response, label, label_review}; rows whose label is
                            null (unknown) or under review are counted apart
  answer_pairs/*.jsonl      {id, gold, pred, equal}
  problems/, verl/          questions, each gold judged against itself

Every file is split in two by the sha256 of the problem: rules are worked out on the even half and
checked on the odd one. --list shows the disagreements of one half; programs: tools/programs.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from riskpo.data.questions import load_questions
from riskpo.rewards.pool import VerifierPool
from riskpo.rewards.scorer import MATH
from riskpo.rewards.verdict import OUTCOMES, Outcome, tally

HALVES = ("even", "odd")
_RESPONSE = re.compile(r"\$|\\boxed|\\[(\[]|nswer|[a-z]{2,} [a-z]{2,}")  # more than an answer


def read_rows(path: Path, half: str = "all") -> tuple[list[dict[str, Any]], int]:
    """Rows of the chosen half of the problems with a usable label, and how many have none."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in map(_as_labelled, rows) if in_half(row["problem"], half)]
    usable = [row for row in rows if row["label"] is not None and not row["label_review"]]
    return usable, len(rows) - len(usable)


def _as_labelled(row: dict[str, Any]) -> dict[str, Any]:
    """A pair of answers as a labelled output: its gold takes the problem's place in the hash."""
    if "equal" not in row:
        return row
    pred = row["pred"]
    if not _RESPONSE.search(pred):
        pred = f"\\boxed{{{pred}}}"  # an answer, where a response is expected
    pair = {"problem": str(row["gold"]), "response": pred, "label": row["equal"]}
    return {**row, **pair, "label_review": None}


def in_half(problem: str, half: str) -> bool:
    odd = hashlib.sha256(problem.encode()).digest()[-1] % 2
    return half == "all" or odd == (half == "odd")


def judge(pool: VerifierPool, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with its `verdict` and whether that `agrees` with the label."""
    verdicts = pool.run([(str(row["gold"]), row["response"]) for row in rows])
    return [
        {**row, "verdict": v, "agrees": (v.outcome is Outcome.RIGHT) == row["label"]}
        for row, v in zip(rows, verdicts, strict=True)
    ]


def heading(*columns: str) -> None:
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))


def line(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def answers(pool: VerifierPool, files: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prints a table; yields (half, row) for every disagreement."""
    heading("file", "half", "agree / rows", "%", "left out", *OUTCOMES)
    for path in files:
        for half in HALVES:
            rows, left_out = read_rows(path, half)
            judged = judge(pool, rows)
            counts, agree = (
                tally(row["verdict"] for row in judged),
                sum(r["agrees"] for r in judged),
            )
            share = f"{100 * agree / max(1, len(rows)):.1f}"
            line(path.stem, half, f"{agree} / {len(rows)}", share, left_out,
                 *(counts[name] for name in OUTCOMES))  # fmt: skip
            yield from ((half, row) for row in judged if not row["agrees"])
    print()


def golds(pool: VerifierPool, files: list[Path]) -> None:
    """Prints how many golds of each file verify against themselves."""
    heading("file", "questions", *OUTCOMES)
    for path in files:
        questions = load_questions(str(path))
        verdicts = pool.run([(q.gold, None) for q in questions])
        seen = tally(verdicts)
        line(path.stem, len(questions), *(seen[name] for name in OUTCOMES))


def show(row: dict[str, Any]) -> None:
    verdict, response = row["verdict"], row["response"]
    print(f"* {row['id']}: label {row['label']}, gold {row['gold']!r}: {verdict.outcome.value}, ")
    print(f"  {verdict.detail}; ends in {response[-120:]!r}")


def main() -> None:
    """Print the tables, and the disagreements of one half on request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="see above")
    parser.add_argument("--list", choices=HALVES, help="show the disagreements of this half")
    parser.add_argument("--only", default="", help="files whose name holds this")
    parser.add_argument("--workers", type=int, default=2, help="processes that judge")
    parser.add_argument("--seconds", type=float, default=10.0, help="for one answer")
    options = parser.parse_args()

    def files(*folders: str) -> list[Path]:
        found = [p for folder in folders for p in sorted((options.folder / folder).glob("*"))]
        return [p for p in found if options.only in p.name and p.suffix in (".jsonl", ".parquet")]

    with VerifierPool(MATH, workers=options.workers, seconds=options.seconds) as pool:
        found = [*answers(pool, files("labelled_outputs"))]
        found += answers(pool, files("answer_pairs"))
        golds(pool, files("problems", "verl"))
    for half, row in found:
        if half == options.list:
            show(row)


if __name__ == "__main__":
    main()

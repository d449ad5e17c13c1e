"""Agreement of the math reward with labelled model answers: python -m tools.agreement FOLDER

FOLDER holds *.jsonl files with rows {id, problem, gold, response, label, label_review}; label is
true, false or null (unknown). Rows with a label_review are left out. --half keeps the problems
whose sha256 is even or odd: rules are worked out on one half and checked on the other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from riskpo.verdicts import Outcome
from riskpo.verifier_pool import VerifierPool

VERIFY = "riskpo.math_reward:verify_math"


def read_rows(path: Path, half: str = "all") -> list[dict[str, Any]]:
    """Rows with a usable label, of the chosen half of the problems."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        row
        for row in rows
        if row["label"] is not None and not row["label_review"] and in_half(row["problem"], half)
    ]


def in_half(problem: str, half: str) -> bool:
    odd = hashlib.sha256(problem.encode()).digest()[-1] % 2
    return half == "all" or odd == (half == "odd")


def compare(
    pool: VerifierPool, rows: list[dict[str, Any]]
) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Counts (agree, false_right, false_wrong, every outcome) and the rows that disagree."""
    verdicts = pool.run([(str(row["gold"]), row["response"]) for row in rows])
    counts: Counter[str] = Counter(rows=len(rows))
    disagree = []
    for row, verdict in zip(rows, verdicts, strict=True):
        said = verdict.outcome is Outcome.RIGHT
        counts[verdict.outcome.value] += 1
        counts["agree" if said == row["label"] else "false_right" if said else "false_wrong"] += 1
        if said != row["label"]:
            disagree.append({**row, "verdict": verdict})
    return counts, disagree


def main() -> None:
    """Print one line per file, and the disagreements on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--half", choices=("all", "even", "odd"), default="all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--show", type=int, default=0, help="disagreements to print per file")
    options = parser.parse_args()
    columns = ["rows", "agree", "false_right", "false_wrong", *(o.value for o in Outcome)]
    print(f"{'file':34s}" + "".join(f"{c:>16s}" for c in columns))
    with VerifierPool(VERIFY, workers=options.workers, seconds=options.seconds) as pool:
        for path in sorted(options.folder.glob("*.jsonl")):
            counts, disagree = compare(pool, read_rows(path, options.half))
            print(f"{path.stem:34s}" + "".join(f"{counts[c]:16d}" for c in columns))
            for row in disagree[: options.show]:
                print(f"  {row['id']} label={row['label']} gold={row['gold']!r}")
                print(f"    {row['verdict']} ...{row['response'][-160:]!r}")


if __name__ == "__main__":
    main()

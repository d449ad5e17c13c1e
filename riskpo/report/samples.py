"""`riskpo samples RUN_DIR`: prompts, responses, verdicts and rewards of a run, by step.

Reads run_dir/rollouts.jsonl, where a run keeps log_texts responses per step, and imports nothing
slow. A row without a verdict counts as right where its reward is above zero, else as wrong.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from riskpo.errors import refusals_in_one_line
from riskpo.files import TEXTS
from riskpo.rewards.verdict import OUTCOMES

Row = dict[str, Any]
SHOWN = 20


def samples_command(given: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="riskpo samples", description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", help="folder of a `riskpo train` run")
    parser.add_argument("--step", help="12 or 10-20 (default: all)")
    parser.add_argument("--text", help="text in the prompt, response or gold, in any case")
    parser.add_argument("--verdict", choices=OUTCOMES, help="(default: all)")
    about = f"most samples to show; 0: all (default: {SHOWN})"
    parser.add_argument("--limit", type=int, default=SHOWN, help=about)
    with refusals_in_one_line(parser.prog):
        a = parser.parse_args(given)
    found = list(chosen(read_samples(a.run_dir), steps_of(a.step), a.text, a.verdict))
    shown = found[: a.limit] if a.limit > 0 else found
    for row in shown:
        print(as_text(row))
    more = "" if len(shown) == len(found) else "; --limit 0 shows all"
    print(f"{len(shown)} of {len(found)} samples{more}")


def read_samples(run_dir: str | Path) -> list[Row]:
    """The rows of a run, which may still be writing: an unfinished last line is left out."""
    path = Path(run_dir) / TEXTS
    if not path.is_file():
        raise ValueError(
            f"samples: there is no {path}. Give the run_dir of a `riskpo train` run; its log_texts "
            "says how many responses of a step are kept."
        )
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{"verdict": "right" if row["reward"] > 0 else "wrong", **row} for row in rows]


def chosen(
    rows: Iterable[Row], steps: range | None, text: str | None, verdict: str | None
) -> Iterable[Row]:
    """Rows of these steps with this verdict that contain the text, in upper or lower case."""
    for row in rows:
        everything = "\n".join(str(row[name]) for name in ("prompt", "response", "gold")).lower()
        asked = (steps is None or row["step"] in steps) and verdict in (None, row["verdict"])
        if asked and (text is None or text.lower() in everything):
            yield row


def steps_of(text: str | None) -> range | None:
    if text is None:
        return None
    first, dash, last = text.partition("-")
    if not first.isdigit() or dash and not last.isdigit():
        raise ValueError(f"samples: got --step {text}; expected 12 or 10-20. Write it like that.")
    return range(int(first), int(last if dash else first) + 1)


def as_text(row: Row) -> str:
    cut = ", cut at the length limit" if row["truncated"] else ""
    head = f"step {row['step']}  {row['verdict']}  reward {row['reward']:g}{cut}"
    texts = (f"  {name:<9}{row[name]!r}" for name in ("prompt", "response", "gold"))
    return "\n".join([f"{head}  ({row['question_id']})", *texts])

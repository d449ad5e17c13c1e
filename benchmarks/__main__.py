"""`python -m benchmarks`: run a set of cases, print tables, write JSON after every case.

python -m benchmarks                   about six minutes on two quiet CPU cores
python -m benchmarks --quick           does every module run? (seconds; numbers mean nothing)
python -m benchmarks --gpu             shapes of real models in bfloat16
python -m benchmarks --dry             the GPU run's cases, shrunk, on a CPU
python -m benchmarks --model FOLDER    the head of a pretrained model first (or of one that
                                       `riskpo fetch-model` made: then without asking)
python -m benchmarks --rows FILE       rows of a trained head instead of generated ones
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, peers, real_rows, sets, table
from benchmarks.harness import FIELDS, Settings, run_case

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    for name in ("quick", "gpu", "dry"):
        which.add_argument(f"--{name}", dest="set", action="store_const", const=name)
    parser.set_defaults(set="cpu")
    parser.add_argument(
        "--budget-seconds",
        type=float,
        help="stops cleanly (400, and 300 for each case of a pretrained head; inf: no limit)",
    )
    parser.add_argument("--model", help="a Hugging Face folder, measured on its own answers")
    parser.add_argument("--rows", help="a .safetensors file with hidden [n, r], weight [v, r]")
    parser.add_argument("--out", type=Path, help="JSON file, or a folder for it")
    parser.add_argument("--op", action="append", default=[], help="only these ops (repeatable)")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--only", action="append", default=[], help="only providers so named")
    parser.add_argument("--skip", action="append", default=[], help="no providers so named")
    parser.add_argument("--compile", action="store_true", help="torch.compile in every case")
    parser.add_argument("--seconds-per-row", type=float, help="at most, of one provider")
    parser.add_argument("--note", help="kept with the results, as how the tests went before")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    return parser.parse_args(words)


def settings(a: argparse.Namespace, pretrained: list[sets.Case]) -> Settings:
    """How this set measures: long enough to settle, short enough for its budget."""
    fast = a.set in ("quick", "dry")
    seconds, budget = a.seconds_per_row, a.budget_seconds
    if budget is None:
        budget = 400.0 + 300.0 * len(pretrained)
    if seconds is None:
        seconds = 0.0 if fast else 0.7 if a.set == "gpu" else 2.0
    return Settings(
        device="cuda" if a.set == "gpu" else "cpu",
        most_repeats={"quick": 2, "dry": 1, "gpu": 20}.get(a.set, 5),
        seconds_per_row=seconds,
        longest_call=8.0 if a.set == "cpu" else 5.0,
        compile=a.compile,
        rows=a.rows,
        only=tuple(a.only),
        skip=tuple(a.skip),
        deadline=time.monotonic() + budget,
    )


def pretrained_cases(a: argparse.Namespace) -> list[sets.Case]:
    """Before a CPU's cases, the heads of the pretrained models that are here."""
    if a.set != "cpu":
        return []
    found = real_rows.register(a.model)
    if not found:
        print("no pretrained model here: make demo-llm makes one, --model FOLDER names one")
    return sets.pretrained(found)


def expand(case: sets.Case) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """(module, case name, sizes); small modules list their cases themselves."""
    module = importlib.import_module(f"benchmarks.bench_{case.op}")
    if case.name == "first case":
        name = next(iter(module.CASES))
        yield module, name, module.CASES[name]
    elif case.name == "every case":
        yield from ((module, name, sizes) for name, sizes in list(module.CASES.items())[1:])
    else:
        yield module, case.name, case.sizes


def write(path: Path | None, report: dict[str, Any]) -> None:
    """Replace the file in one step, so that a killed run leaves the cases it finished."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".partial")
    fresh.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def destination(a: argparse.Namespace) -> Path | None:
    """Rehearsals write only where they are told to."""
    if a.out is None and a.set in ("quick", "dry"):
        return None
    folder = a.out or RESULTS
    if folder.suffix == ".json":
        return folder
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d-%H%M")
    return folder / f"{a.set}-{stamp}.json"


def main(words: list[str] | None = None) -> int:
    """Exit status 1 when one of our own providers failed."""
    a = parse(words)
    if a.set == "gpu" and not torch.cuda.is_available():
        print("--gpu needs a CUDA device; --dry rehearses the same cases on a CPU", file=sys.stderr)
        return 2
    if a.threads or a.set in ("quick", "dry"):
        torch.set_num_threads(a.threads or 1)  # rehearsals leave the machine to others
    peers.run_alone("verl", "verl.utils")  # its package imports Ray; its ops need none
    pretrained = pretrained_cases(a)
    start, s = time.monotonic(), settings(a, pretrained)
    report: dict[str, Any] = {"schema": SCHEMA, "set": a.set, "fields": list(FIELDS)}
    report["note"] = a.note
    report |= {"environment": environment.describe(s.device), "rows": [], "left_out": s.left_out}
    path = destination(a)
    print(f"{report['environment']['command']}  ({a.set}, {report['environment']['date']})")
    for case in pretrained + sets.SETS[a.set]():
        if (a.op and case.op not in a.op) or a.case not in case.name:
            continue
        for module, name, sizes in expand(case):
            if s.spent():
                s.left_out.append(f"{case.op} {name}")
                continue
            rows = measure(module, name, sizes, s, case)
            report["rows"] += rows
            report["seconds"] = round(time.monotonic() - start, 1)
            print(table.terminal(case.op, name, rows), flush=True)
            write(path, report)
    write(path, report)
    if s.lost:
        name = s.lost[0]
        print(f"\nthe device was lost in {name!r}; repeat with --skip {name!r}")
    return finish(report, path) or int(bool(s.lost))


def measure(
    module: Any, name: str, sizes: dict[str, Any], s: Settings, case: sets.Case
) -> list[dict[str, Any]]:
    """Rows of one case; a case that cannot be built is a row with its reason."""
    if case.compile:
        s = dataclasses.replace(s, compile=True)
    rows = []
    try:
        for row in run_case(module, name, sizes, s, case.only):
            took = row["reason"] or f"{row['median_ms']:,.0f} ms"
            print(f"  {name}: {row['provider']}: {took}", file=sys.stderr, flush=True)
            rows.append(row)
        return rows
    except torch.OutOfMemoryError as error:
        if s.device == "cuda":
            torch.cuda.empty_cache()
        row = dict.fromkeys(FIELDS) | {"op": case.op, "case": name, "sizes": sizes, "extras": {}}
        row |= {"provider": "all", "device": s.device, "failed": False}
        return [row | {"reason": f"the inputs do not fit: {str(error)[:120]}"}]


def finish(report: dict[str, Any], path: Path | None) -> int:
    """What was left out, what failed, where the JSON is."""
    if report["left_out"]:
        cases = dict.fromkeys(name.partition(":")[0] for name in report["left_out"])
        print(f"\nleft out, all or in part, for lack of time or device: {'; '.join(cases)}")
    failed = [r for r in report["rows"] if r["failed"]]
    for r in failed:
        print(f"\nFAILED {r['op']} {r['case']} {r['provider']}: {r['reason']}")
    print(f"\n{report.get('seconds', 0)} s" + (f", written to {path}" if path else ""))
    return int(any(r["kind"] == "ours" for r in failed))


if __name__ == "__main__":
    raise SystemExit(main())

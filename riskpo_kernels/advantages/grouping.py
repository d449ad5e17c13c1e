"""From flat rows to draws of bundles: rows[i, j] is the response to question i in draw j.

Rows are known by (question, draw), never by where they stand. Result: rows [Q, G] int64, bundles
in consecutive questions, draws in columns; its entries index the caller's flat batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from riskpo_kernels.core.checks import describe, reject
from riskpo_kernels.reference.pairing import draw_permutation, question_order

OP = "RiskPOAdvantage"
Question = int | str
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def group_rows(question_id: Any, draw: Any, count: int) -> dict[Question, list[int]]:
    """Rows of each question in the order of their draws; questions in order of appearance.

    Without `draw` the draws of a question are numbered as they occur. ValueError on a length other
    than `count`, ids that are neither all ints nor all strings, a repeated draw, or questions that
    have different numbers of responses.
    """
    questions = _listed("question_id", question_id, count)
    if not all(type(q) is int for q in questions) and not all(type(q) is str for q in questions):
        questions = [_plain(q) for q in questions]
    if len({type(q) for q in questions}) > 1:
        reject(OP, "question_id with ints and strings", "one kind of id", "Convert all to str.")
    draws = None if draw is None else _listed("draw", draw, count)
    for d in draws or ():
        if not hasattr(d, "__index__"):
            reject(OP, f"draw with {describe(d)}", "ints", "Number each question's responses.")
    groups: dict[Question, list[int]] = {}
    for row, question in enumerate(questions):
        groups.setdefault(question, []).append(row)
    if draws is not None:
        for question, rows in groups.items():
            if len({draws[row] for row in rows}) < len(rows):
                came = f"a draw that occurs twice in question {question!r}"
                reject(OP, came, "distinct draws per question", "Number its responses 0..G-1.")
            rows.sort(key=lambda row: draws[row])
    first = next(iter(groups))
    for question, rows in groups.items():
        if len(rows) != len(groups[first]):
            reject(
                OP,
                f"{len(rows)} responses to question {question!r}, "
                f"{len(groups[first])} to question {first!r}",
                "the same number for every question",
                "Pad with reward-0 responses or leave the surplus out.",
            )
    return groups


def named(groups: dict[Question, list[int]]) -> dict[str, list[int]]:
    """The groups by name: as text 1 and "1" stay apart, and lists and tensors name ints alike."""
    return {f"{'s' if isinstance(q, str) else 'i'}:{q}": rows for q, rows in groups.items()}


def bundle_order(
    names: Sequence[str],
    *,
    bundle_size: int,
    pairing: str,
    seed: int,
    step: int,
    difficulty: Mapping[str, float] | None = None,
) -> list[str]:
    """The bundled questions, Q' the largest multiple of bundle_size; a run of B is a bundle.

    "permuted": a random order, a function of (seed, step, question) alone; "index": as they came.
    With a difficulty, rising by it afterwards: like stands beside like, ties stay in that order.
    """
    order = list(names)
    if pairing == "permuted":
        order = question_order(order, seed=seed, step=step)
    order = order[: len(order) - len(order) % bundle_size]
    return order if difficulty is None else sorted(order, key=lambda name: difficulty[name])


def pair_rows(
    groups: Mapping[str, list[int]], order: Sequence[str], *, pairing: str, seed: int, step: int
) -> torch.Tensor:
    """Rows [Q', G] of the questions in `order`, a draw in each column of a bundle.

    "permuted": each question's responses permuted independently, a function of (seed, step,
    question) alone. "index": j-th response to draw j.
    """
    table = []
    for name in order:
        rows = groups[name]
        if pairing == "permuted":
            rows = [rows[j] for j in draw_permutation(name, len(rows), seed=seed, step=step)]
        table.append(rows)
    return torch.tensor(table, dtype=torch.int64, device="cpu")


def _plain(question: Any) -> Question:
    if isinstance(question, str):
        return str(question)
    if hasattr(question, "__index__") and not isinstance(question, bool):
        return int(question)
    reject(OP, f"question_id with {describe(question)}", "ints or strings", "Convert the ids.")


def _listed(name: str, ids: Any, count: int) -> Sequence[Any]:
    if isinstance(ids, torch.Tensor):
        if ids.ndim != 1 or ids.dtype not in INTEGERS:
            came = f"{name} = {describe(ids)}"
            reject(OP, came, f"an integer tensor [{count}]", f"Flatten or convert {name}.")
        ids = ids.tolist()
    elif isinstance(ids, str) or not hasattr(ids, "__len__"):
        reject(OP, f"{name} = {describe(ids)}", "a list or tensor", f"Pass one {name} per reward.")
    if len(ids) != count:
        todo = "Pass one per response."
        reject(OP, f"{len(ids)} values of {name}", f"{count}, one per reward", todo)
    return ids

"""Which rows of a generation batch belong together: told by question and answer, not by place.

TRL spreads the answers to a question over ranks and shuffles them afterwards. Rows with the same
content of their dataset row answer the same question, and a hash of the answers orders them, so
that no result depends on which rank held which row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from riskpo.data.values import finite_number

OP = "RiskPOTrainer"


def question_key(row: dict[str, Any], column: str | None) -> str:
    """A row's question: its `column`, or a hash of everything in it.

    ValueError where the column is missing, or without one where the row holds what JSON cannot.
    """
    if column is not None:
        if column not in row:
            raise ValueError(
                f"{OP}: got a dataset row without the column {column!r}; expected it to name the "
                f"question. Its columns are {sorted(row)}: set riskpo_question_column to one."
            )
        return str(row[column])
    try:
        text = json.dumps(row, sort_keys=True)
    except TypeError as error:
        raise ValueError(
            f"{OP}: got a dataset row whose columns {sorted(row)} are not all plain values "
            f"({error}); expected text, numbers and lists to tell questions by. Set "
            "riskpo_question_column to a column that names the question."
        ) from None
    return hashlib.sha256(text.encode()).hexdigest()


def prior_of(row: dict[str, Any], column: str) -> float:
    """How easy the row's question is; ValueError where its `column` holds no finite number."""
    return finite_number(row.get(column), f"{OP}: riskpo_prior_column {column!r}")


def answer_key(tokens: Sequence[int]) -> str:
    """A hash of the sampled tokens."""
    return hashlib.sha256(",".join(str(int(t)) for t in tokens).encode()).hexdigest()


def question_ids(keys: Sequence[str], draws: int) -> list[str]:
    """One id per question of `draws` rows; a question met twice in a batch is two questions.

    The ids are `key`, then `key/1` and so on in order of occurrence: answers to the same question
    are exchangeable. ValueError where the rows of a key are no multiple of `draws`.
    """
    seen: dict[str, int] = {}
    ids = []
    for key in keys:
        copy, seen[key] = seen.get(key, 0) // draws, seen.get(key, 0) + 1
        ids.append(f"{key}/{copy}" if copy else key)
    for key, count in seen.items():
        if count % draws:
            raise ValueError(
                f"{OP}: got {count} answers to question {key!r}; expected a multiple of "
                f"num_generations={draws}. A sampler that splits questions cannot be bundled."
            )
    return ids

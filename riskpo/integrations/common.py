"""What every integration shares: an advantage that counts its batches, and its state file.

A host is the trainer that riskpo plugs into. It passes a batch and no step, so the step is the
number of batches seen, which is part of the state.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from riskpo.files import write_json
from riskpo_kernels import RiskPOAdvantage

STATE_FILE = "riskpo_state.json"


class CountedAdvantage:
    """RiskPOAdvantage for a host that passes no step: every call is the next step.

    settings    preset (default "paper"), ragged, and the overrides of RiskPOAdvantage
    ragged      "error" refuses a batch whose questions have unequal numbers of answers. "drop"
                leaves out the questions with fewer answers than the fullest: advantage 0, not
                tracked, counted as ragged_questions. The number of questions then varies, so
                combine it with leftover="drop"
    names_stay  whether a question has the same name each time; difficulty="history" needs that
    """

    def __init__(self, op: str, settings: dict[str, Any], *, names_stay: bool) -> None:
        given = dict(settings)
        self.op = op
        self.ragged = given.pop("ragged", "error")
        if self.ragged not in ("error", "drop"):
            raise ValueError(f"{op}: got ragged={self.ragged!r}; expected 'error' or 'drop'.")
        self.preset = given.pop("preset", "paper")
        self.advantage = RiskPOAdvantage(self.preset, **given)
        s = self.advantage.settings
        if s.difficulty == "prior":
            raise ValueError(
                f"{op}: got difficulty='prior'; expected 'history' or 'cross-fit': the host passes "
                "no column of the data to an advantage. Choose one of them."
            )
        if s.bundling == "matched" and s.difficulty == "history" and not names_stay:
            raise ValueError(
                f"{op}: got difficulty='history' with matched bundles; expected 'cross-fit': the "
                "host gives a question a new name each time, so it has no history. Set it."
            )
        self.batches = 0

    def __call__(
        self, rewards: torch.Tensor, questions: Sequence[Any], keys: Sequence[Any]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Advantage [N], float32, of rewards [N], and this batch's statistics; moves the tracker.

        questions [N] name the question of each row, keys [N] tell its answers apart (see
        `draw_numbers`). ValueError as RiskPOAdvantage raises it, and on ragged questions.
        """
        rows = self._whole(questions)
        kept = [questions[row] for row in rows]
        draw = None
        if self.advantage.settings.pairing == "permuted":
            draw = draw_numbers(kept, [keys[row] for row in rows])
        values, stats = self.advantage(rewards[rows], kept, step=self.batches, draw=draw)
        self.batches += 1
        result = torch.zeros(len(questions), dtype=values.dtype, device=values.device)
        result[rows] = values
        left_out = len(set(questions)) - len(set(kept))
        return result, stats | {"ragged_questions": float(left_out)}

    def _whole(self, questions: Sequence[Any]) -> list[int]:
        """Rows of the questions that have as many answers as the fullest one."""
        counts = Counter(questions)
        most = max(counts.values(), default=0)
        short = [question for question, count in counts.items() if count < most]
        if short and self.ragged == "error":
            raise ValueError(
                f"{self.op}: got {len(short)} of {len(counts)} questions with fewer answers than "
                f"{most}, such as {short[0]!r} with {counts[short[0]]}; expected the same number "
                "for each. Keep failed answers with reward 0, or set ragged='drop' and "
                "leftover='drop' to leave such questions out."
            )
        return [row for row, question in enumerate(questions) if counts[question] == most]

    def state_dict(self) -> dict[str, Any]:
        """The state as numbers, strings and lists, ready for JSON."""
        return {
            "batches": self.batches,
            "settings": dataclasses.asdict(self.advantage.settings),
            "advantage": self.advantage.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was saved; ValueError if it was saved with other settings."""
        check_settings(self.op, self.advantage, state["settings"])
        self.advantage.load_state_dict(state["advantage"])
        self.batches = state["batches"]


def check_settings(op: str, advantage: RiskPOAdvantage, then: dict[str, Any]) -> None:
    """ValueError where the settings of a saved run, `then`, are not those of `advantage`."""
    mine = dataclasses.asdict(advantage.settings)
    changed = {name: then.get(name) for name in mine if mine[name] != then.get(name)}
    if changed:
        now = {name: mine[name] for name in changed}
        raise ValueError(
            f"{op}: got {now}; expected the settings of the saved run, {changed}: its tracked "
            "quantiles belong to them. Restore them, or start a new run from its weights."
        )


def draw_numbers(questions: Sequence[Any], keys: Sequence[Any]) -> list[int]:
    """[N], 0..G-1 within each question, by the answers' keys; equal keys in order of place."""
    numbers = [0] * len(questions)
    seen: Counter[Any] = Counter()
    for row in sorted(range(len(questions)), key=lambda row: (keys[row], row)):
        numbers[row] = seen[questions[row]]
        seen[questions[row]] += 1
    return numbers


def write_state(folder: str | os.PathLike[str], state: dict[str, Any]) -> Path:
    """Write folder/riskpo_state.json atomically; returns its path."""
    return write_json(Path(folder) / STATE_FILE, state)


def read_state(op: str, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The state that `write_state` wrote; ValueError if the folder has none."""
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{op}: got a checkpoint without {STATE_FILE} ({folder}); expected one that a run with "
            "RiskPO saved: resuming without it would forget the tracked quantiles. Resume from an "
            "older checkpoint that has the file, or start a new run from these weights."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def check_per_token(op: str, name: str, x: torch.Tensor, mask: torch.Tensor) -> None:
    """ValueError unless x has the mask's shape: in a square batch [B] would spread over tokens."""
    if x.shape != mask.shape:
        raise ValueError(
            f"{op}: got {name} {list(x.shape)}; expected {list(mask.shape)}, one per token as the "
            "mask. Spread it over the tokens."
        )


def known_weights(
    op: str, weights: torch.Tensor | None, mask: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """A host's sampler-mismatch weights with 0 in place of NaN, and how many counted ones were NaN.

    NaN is what a sampler's missing log-prob leaves: it costs its token, or in weights that a host
    has spread over a sequence its sequence, not the step.
    """
    if weights is None:
        return None, torch.zeros((), dtype=torch.int64, device=mask.device)
    check_per_token(op, "weights", weights, mask)
    missing = weights.isnan() & (mask != 0)
    return torch.where((mask != 0) & ~missing, weights, 0.0).detach(), missing.sum()


def sequence_advantage(op: str, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B] from advantages [B, T] that hosts spread over the counted tokens; 0 for empty rows.

    ValueError where a sequence's tokens differ: a sequence ratio has one advantage per sequence;
    and on another shape than the mask's, which a square batch would not betray.
    """
    check_per_token(op, "advantages", advantages, mask)
    live = mask != 0
    first = live.int().argmax(-1, keepdim=True)
    value = torch.where(live.any(-1), advantages.gather(-1, first)[:, 0], 0.0)
    if torch.where(live, advantages != value[:, None], False).any():
        raise ValueError(
            f"{op}: got advantages that differ within a sequence; expected one per sequence. Use "
            "the riskpo estimator, or a loss with a token ratio."
        )
    return value

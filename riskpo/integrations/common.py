"""What every integration shares: an advantage that counts its batches, and its state file.

A host is the trainer that riskpo plugs into. Hosts pass a batch and no step, so the step is the
number of batches seen, which is part of the state.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from riskpo.files import write_json
from riskpo_kernels import RiskPOAdvantage

STATE_FILE = "riskpo_state.json"


def check_window(package: str, lowest: str, below: str) -> None:
    """ImportError unless lowest <= the installed version of `package` < below.

    An integration uses parts of its host that are not public. They may change with a minor version.
    """
    remedy = f"Run: pip install '{package}>={lowest},<{below}'"
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"riskpo.integrations: {package} is not installed. {remedy}") from None
    low, now, end = (Version(text).release for text in (lowest, found, below))
    if not low <= now < end:
        raise ImportError(
            f"riskpo.integrations: got {package} {found}; expected a tested version, "
            f">={lowest},<{below}. {remedy}"
        )


class CountedAdvantage:
    """RiskPOAdvantage for a host that passes no step: every call is the next step.

    settings     preset (default "paper"), ragged, and the overrides of RiskPOAdvantage
    ragged       "error": ValueError if questions have unequal numbers of answers. "drop": questions
                 with fewer answers than the fullest get advantage 0, do not move the tracker and
                 are counted as ragged_questions. Combine it with leftover="drop", since the number
                 of questions then varies
    names_stay   whether a question has the same name each time; difficulty="history" needs that
    gives_prior  whether the host passes a prior; difficulty="prior" needs that
    """

    def __init__(
        self, op: str, settings: dict[str, Any], *, names_stay: bool, gives_prior: bool = False
    ) -> None:
        given = {"preset": "paper", "ragged": "error"} | settings
        self.op, self.ragged, self.batches = op, given.pop("ragged"), 0
        if self.ragged not in ("error", "drop"):
            raise ValueError(f"{op}: got ragged={self.ragged!r}; expected 'error' or 'drop'.")
        self.advantage = RiskPOAdvantage(given.pop("preset"), **given)
        s = self.advantage.settings
        if s.difficulty == "prior" and not gives_prior:
            raise ValueError(
                f"{op}: got difficulty='prior'; expected 'history' or 'cross-fit': the host passes "
                "no column of the data to an advantage. Choose one of them."
            )
        if s.bundling == "matched" and s.difficulty == "history" and not names_stay:
            raise ValueError(
                f"{op}: got difficulty='history' with matched bundles; expected 'cross-fit': the "
                "host gives a question a new name each time, so it has no history. Set it."
            )

    def __call__(
        self,
        rewards: torch.Tensor,
        questions: Sequence[Any],
        keys: Sequence[Any],
        prior: Sequence[float] | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """(advantage [N] float32, statistics) of one batch with rewards [N]; moves the tracker.

        questions [N] name the question of each row. keys [N] tell its answers apart, see
        `draw_numbers`. ValueError as RiskPOAdvantage raises, and for ragged questions.
        """
        rows = self._whole(questions)
        kept = [questions[row] for row in rows]
        draw = None
        if self.advantage.settings.pairing == "permuted":
            draw = draw_numbers(kept, [keys[row] for row in rows])
        easy = None if prior is None else [prior[row] for row in rows]
        values, stats = self.advantage(
            rewards[rows], kept, step=self.batches, draw=draw, prior=easy
        )
        self.batches += 1
        result = torch.zeros(len(questions), dtype=values.dtype, device=values.device)
        result[rows] = values
        left_out = len(set(questions)) - len(set(kept))
        return result, stats | {"ragged_questions": float(left_out)}

    def over_tokens(
        self, token_rewards: torch.Tensor, mask: torch.Tensor, questions: Sequence[str]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """(advantage [B, T] float32, statistics): each response's advantage at its counted tokens.

        token_rewards, mask [B, T]; a response's reward is the sum of its row. questions [B]; a row
        of question "" is padding: it gets 0 and is in no bundle. Answers to a question are told
        apart by reward and mask, so that row order does not matter.
        """
        scores = token_rewards.detach().double().sum(-1).cpu()
        live = mask.detach().cpu() != 0
        rows = [row for row, question in enumerate(questions) if question]
        keys = [(float(scores[row]), live[row].tolist()) for row in rows]
        value = torch.zeros(len(questions))
        value[rows], stats = self(scores[rows], [questions[row] for row in rows], keys)
        return torch.where(live, value[:, None], 0.0).to(token_rewards.device), stats

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
        mine, then = dataclasses.asdict(self.advantage.settings), state["settings"]
        changed = {name: then.get(name) for name in mine if mine[name] != then.get(name)}
        if changed:
            now = {name: mine[name] for name in changed}
            raise ValueError(
                f"{self.op}: got {now}; expected the settings of the saved run, {changed}: its "
                "tracked quantiles belong to them. Restore them, or start a new run from its "
                "weights."
            )
        self.advantage.load_state_dict(state["advantage"])
        self.batches = state["batches"]

    def save(self, folder: str | os.PathLike[str], **more: Any) -> None:
        """Write the state, and what else is given, to folder/riskpo_state.json, atomically."""
        write_json(Path(folder) / STATE_FILE, self.state_dict() | more)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """`load_state_dict` of what `save` wrote; ValueError if the folder has no state."""
        state = read_state(Path(folder))
        if state is None:
            raise ValueError(missing_state(self.op, folder))
        self.load_state_dict(state)


def read_state(folder: Path) -> dict[str, Any] | None:
    """What `CountedAdvantage.save` wrote; None if the folder has no state."""
    path = folder / STATE_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def missing_state(op: str, folder: str | os.PathLike[str]) -> str:
    return (
        f"{op}: got a checkpoint without {STATE_FILE} ({folder}); expected one that a run with "
        "RiskPO saved: resuming without it would forget the tracked quantiles. Resume from an "
        "older checkpoint that has the file, or start a new run from these weights."
    )


def draw_numbers(questions: Sequence[Any], keys: Sequence[Any]) -> list[int]:
    """[N], 0..G-1 within each question, by the answers' keys; equal keys in order of place."""
    numbers = [0] * len(questions)
    seen: Counter[Any] = Counter()
    for row in sorted(range(len(questions)), key=lambda row: (keys[row], row)):
        numbers[row] = seen[questions[row]]
        seen[questions[row]] += 1
    return numbers


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
    """(a host's sampler correction [B, T] with 0 for NaN, how many counted weights were NaN).

    A weight is NaN where the sampler gave no log-prob. Such a token, or with weights that the host
    spreads over a sequence such a sequence, drops out of the loss.
    """
    if weights is None:
        return None, torch.zeros((), dtype=torch.int64, device=mask.device)
    check_per_token(op, "weights", weights, mask)
    missing = weights.isnan() & (mask != 0)
    return torch.where((mask != 0) & ~missing, weights, 0.0).detach(), missing.sum()


def sequence_advantage(op: str, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B], detached, from advantages [B, T] that a host spread over the counted tokens.

    0 for rows without any. ValueError for another shape than the mask's, or if the tokens of a
    sequence differ: a sequence ratio takes one advantage per sequence.
    """
    check_per_token(op, "advantages", advantages, mask)
    live = mask != 0
    first = live.int().argmax(-1, keepdim=True)
    value = torch.where(live.any(-1), advantages.gather(-1, first)[:, 0], 0.0).detach()
    if torch.where(live, advantages != value[:, None], False).any():
        raise ValueError(
            f"{op}: got advantages that differ within a sequence; expected one per sequence. Use "
            "the riskpo estimator, or a loss with a token ratio."
        )
    return value

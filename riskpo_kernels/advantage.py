"""RiskPO's advantage: flat rewards -> bundles -> risk -> credit -> flat advantages.

Q questions, G responses each, B questions per bundle, K = Q / B bundles:

    rewards [N]  ->  rows [Q, G]  ->  scores R [K, G]  ->  A [K, G]  ->  credit [K, B, G]  ->  [N]

Everything runs in float64 on the CPU, whatever the rewards' device: a few thousand numbers, and
every rank and every resumed run gets the same bits. The result goes back to the rewards' device.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch

from riskpo_kernels.advantages.batch_stats import TIED_STD, batch_stats, sample_std
from riskpo_kernels.advantages.conditional import (
    conditional_advantage,
    left_one_out,
    risk_advantage,
)
from riskpo_kernels.advantages.credit import CREDITS
from riskpo_kernels.advantages.difficulty import RewardHistory, prior_of
from riskpo_kernels.advantages.grouping import bundle_order, group_rows, named, pair_rows
from riskpo_kernels.advantages.presets import OP, RiskPOSettings, settings_from
from riskpo_kernels.core.checks import describe, reject
from riskpo_kernels.risk import QuantileTracker, bundle_scores


class RiskPOAdvantage:
    """Advantage of every response from the risk of the bundles it sits in (arXiv 2510.00911).

    Presets (rows of riskpo_kernels.advantages.presets.PRESETS, whose fields are the overrides):
      "paper"          pooled tracked quantiles, seeded pairing, paper form, uniform credit
      "official-easy"  what the released code (RTkenny/RiskPO) runs on easy data: each bundle's own
                       quantiles, index pairing, w_mix form over the bundle's std, credit std
      "official-hard"  the same on hard data: credit sum-mean, beta 0.8, no natural baseline
      "matched"        not the authors': conditional credit in bundles of like difficulty (history),
                       leave-one-out; the weight of hard questions is real then (docs/risk.md)

    Overrides:
      form, alpha, beta, omega, w_mix, eps   as in `mvar_advantage`
      bundle_size   B
      quantiles     "tracked": those of the previous steps (QuantileTracker with tracker_step), at
                    the first step this batch's; "bundle": each bundle's own over its G draws,
                    linearly interpolated; "mix": the average of the two
      baseline      "natural": the form's constant (0 at and above q_beta; form mean: the bundle's
                    mean); "none"; "leave-one-out": "none" minus the mean over the bundle's other
                    draws; "batch": "none" minus the mean over all draws. With conditional credit
                    the others are the question's other responses
      scale         "none"; "bundle-std": over (std of the bundle's G scores + eps), n - 1, 1 when
                    they tie; "batch-std": over (max(std of all scores, std_floor) + eps)
      credit        "uniform" | "score" | "std" | "sum-mean": see riskpo_kernels.advantages.credit;
                    "conditional": the mean over all pairings, see
                    riskpo_kernels.advantages.conditional
      bundling      "random"; "matched": questions of like difficulty, by `difficulty`: "history"
                    (history_rate; kept in state_dict), "prior" or "cross-fit" (each half of the
                    responses in bundles chosen by the other), see
                    riskpo_kernels.advantages.difficulty
      pairing       "permuted": bundles and draws chosen by (seed, step, question id) alone;
                    "index": bundles in order of first appearance and j-th response to draw j, as
                    the official code does, so these do depend on the order of the rows
      leftover      Q not divisible by B: "error", or "drop" the surplus (advantage 0, not tracked,
                    counted in stats, warned about once)

    ValueError on an unknown name or value, or on scale="bundle-std" with an advantage that does not
    vanish where a bundle's draws tie (tracked quantiles): it would be divided by zero.
    """

    def __init__(self, preset: str = "paper", **overrides: Any) -> None:
        self.settings: RiskPOSettings = settings_from(preset, overrides)
        s = self.settings
        self._tracker = QuantileTracker((s.alpha, s.beta), s.tracker_step)
        self._history = RewardHistory(s.history_rate)
        self._older = RewardHistory(s.history_rate)  # of last_step's questions, before it
        self._used: torch.Tensor | None = None  # tracked quantiles that last_step worked with
        self._last_step: int | None = None
        self._warned = False

    def __call__(
        self,
        rewards: torch.Tensor,
        question_id: Any,
        *,
        step: int,
        draw: Any = None,
        prior: Any = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Advantage [N] (float32, detached, on the rewards' device) and this step's statistics.

        rewards [N], any real dtype; question_id [N], ints or strings, list or tensor; every
        question has the same number of responses and is one question wherever its rows stand.
        draw [N], ints, numbers the responses within a question; by default they count as they
        occur. With it, "permuted" results do not depend on the order of the rows at all; without
        it, not on the order between questions. prior [N], with difficulty="prior" only: a number
        per question, larger for easier ones.

        step, an int that never falls: the tracked quantiles and the history in use are those of
        earlier steps; a step above the last one moves them once, after the advantages. The same
        step again (a retry, an evaluation) works with the same ones and moves nothing. Under data
        parallelism every rank passes the whole gathered batch. stats: see `batch_stats`.

        ValueError on non-finite rewards, ragged groups, a falling step, leftover questions (unless
        dropped), a missing prior, too few responses to cross-fit, or one response per question
        where they are only compared with each other (baseline="leave-one-out", quantiles="bundle",
        form="mean" with baseline="natural").
        """
        s = self.settings
        r = _checked_rewards(rewards)
        self._check_step(step)
        groups = named(group_rows(question_id, draw, r.numel()))
        dropped = self._check_counts(groups)
        given = prior_of(prior, groups) if s.difficulty == "prior" and self._matches else None
        tables = self._tables(groups, r, step, given)
        scores = torch.cat([bundle_scores(r[rows], s.bundle_size) for _, rows in tables], 1)
        tracked = self._tracked(scores, step)

        q = _quantiles(scores, tracked, s)
        stats: dict[str, float] = {}
        if s.credit == "conditional":
            a, stats = conditional_advantage(r, tables, (q[0][0].item(), q[1][0].item()), s, step)
            advantage = scaled(a[None], scores, s)[0]
        else:
            advantage = torch.zeros_like(r)
            by_bundle = r[tables[0][1]].unflatten(0, (-1, s.bundle_size))
            a = scaled(baselined(scores, q, s), scores, s)
            advantage[tables[0][1]] = CREDITS[s.credit](a, by_bundle, s.eps).flatten(0, 1)
        if self._matches and s.difficulty == "history":
            stats["history_known_fraction"] = self._history_before(step).known(list(groups))

        moves = self._last_step is None or step > self._last_step
        if moves:
            self._move(r, groups, scores, tracked, step)
        stats |= batch_stats(r, groups, scores, q, tracked, advantage, s)
        stats |= {"dropped_questions": float(dropped), "tracker_moved": float(moves)}
        return advantage.float().to(rewards.device), stats

    @property
    def _matches(self) -> bool:
        return self.settings.bundling == "matched"

    def _tables(
        self,
        groups: dict[str, list[int]],
        r: torch.Tensor,
        step: int,
        prior: dict[str, float] | None,
    ) -> list[tuple[list[str], torch.Tensor]]:
        """(questions, rows [Q', G]) of each bundling: one, or two of half of the columns each."""
        s, names = self.settings, list(groups)
        how: dict[str, Any] = {"pairing": s.pairing, "seed": s.seed, "step": step}
        if self._matches and s.difficulty == "history":
            prior = self._history_before(step).difficulty(names)
        order = bundle_order(names, bundle_size=s.bundle_size, difficulty=prior, **how)
        rows = pair_rows(groups, order, **how)
        if not (self._matches and s.difficulty == "cross-fit"):
            return [(order, rows)]
        half = rows.shape[1] // 2
        parts = (rows[:, :half], rows[:, half:])
        tables = []
        for own, other in (parts, parts[::-1]):
            by = r[other].mean(1).argsort(stable=True)
            tables.append(([order[i] for i in by.tolist()], own[by]))
        return tables

    def _history_before(self, step: int) -> RewardHistory:
        """The history that this step works with: as it was before the step moved it."""
        return self._older if step == self._last_step else self._history

    def _move(
        self,
        r: torch.Tensor,
        groups: dict[str, list[int]],
        scores: torch.Tensor,
        tracked: torch.Tensor,
        step: int,
    ) -> None:
        """Tracker, history and last step as the next step finds them."""
        self._tracker.update(scores)
        self._last_step, self._used = step, tracked
        if self._matches and self.settings.difficulty == "history":
            means = {name: float(r[rows].mean()) for name, rows in groups.items()}
            self._older = self._history.only(means)
            self._history.update(means)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: tracker, history, last step and what it used, pairing seed."""
        return {
            "history": dict(self._history.means),
            "older": dict(self._older.means),
            "tracker": self._tracker.state_dict(),
            "last_step": self._last_step,
            "used": None if self._used is None else self._used.tolist(),
            "seed": self.settings.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was saved; its pairing seed replaces this object's.

        ValueError when it tracked other levels or with another tracker_step.
        """
        self._tracker.load_state_dict(state["tracker"])
        self._last_step = state["last_step"]
        self._history.means = dict(state.get("history", {}))  # older checkpoints have none
        self._older.means = dict(state.get("older", {}))
        used = state["used"]
        self._used = None if used is None else torch.tensor(used, dtype=torch.float64, device="cpu")
        self.settings = dataclasses.replace(self.settings, seed=state["seed"])

    def _check_step(self, step: int) -> None:
        if type(step) is not int or step < 0:
            todo = "Pass the trainer's step."
            reject(OP, f"step={step!r}", "an int of at least 0", todo)
        if self._last_step is not None and step < self._last_step:
            todo = "Pass a rising step; after a restart load the state_dict saved at that step."
            reject(OP, f"step={step}", f"at least {self._last_step}, the last step seen", todo)

    def _check_counts(self, groups: dict[str, list[int]]) -> int:
        """How many questions have to be dropped."""
        s, questions = self.settings, len(groups)
        surplus = questions % s.bundle_size
        if surplus and (s.leftover == "error" or questions < s.bundle_size):
            todo = f"Send {surplus} fewer, change bundle_size, or set leftover='drop'."
            if questions < s.bundle_size:
                todo = "Send more questions per step or set a smaller bundle_size."
            came = f"{questions} questions with bundle_size={s.bundle_size}"
            reject(OP, came, "a multiple of bundle_size", todo)
        draws = len(next(iter(groups.values())))
        if s.compares_responses and draws < 2:
            came = f"1 response per question with baseline={s.baseline!r}, form={s.form!r}, "
            todo = "Sample more responses: alone, each would get advantage 0 for ever."
            reject(OP, f"{came}quantiles={s.quantiles!r}", "2 or more responses", todo)
        if self._matches and s.difficulty == "cross-fit":
            least = 4 if s.baseline == "leave-one-out" else 2
            if draws < least:
                came = f"difficulty='cross-fit' with {draws} responses per question"
                reject(OP, came, f"{least} or more", "Sample more, or use difficulty='history'.")
        if surplus and not self._warned:
            self._warned = True
            text = (
                f"{OP}: {questions} questions do not fill bundles of {s.bundle_size}; {surplus} "
                "get advantage 0 in this step. Later steps only count them in stats."
            )
            warnings.warn(text, stacklevel=3)
        return surplus

    def _tracked(self, scores: torch.Tensor, step: int) -> torch.Tensor:
        """[2]: the tracked quantiles this step works with, before it moves them."""
        if self._used is not None and step == self._last_step:
            return self._used
        if self._tracker.initialised:
            return self._tracker.values
        first = QuantileTracker(self._tracker.levels, self._tracker.step)
        first.update(scores)
        return first.values


def _checked_rewards(rewards: torch.Tensor) -> torch.Tensor:
    if not isinstance(rewards, torch.Tensor) or rewards.ndim != 1 or rewards.is_complex():
        todo = "Flatten them; question_id says which belong together."
        reject(OP, f"rewards = {describe(rewards)}", "a real tensor [N]", todo)
    if rewards.numel() == 0:
        reject(OP, "no rewards", "at least one bundle", "Skip empty batches.")
    r = rewards.detach().cpu().double()
    bad = (~torch.isfinite(r)).nonzero().flatten().tolist()
    if bad:
        came = f"{len(bad)} rewards that are NaN or infinite, first at row {bad[0]}"
        reject(OP, came, "finite rewards", "Give a failed verification a number, such as 0.")
    return r


def _quantiles(
    scores: torch.Tensor, tracked: torch.Tensor, s: RiskPOSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q_alpha, q_beta), each [K, 1]."""
    pooled = tracked[:, None, None].expand(2, scores.shape[0], 1)
    levels = torch.tensor([s.alpha, s.beta], dtype=torch.float64, device="cpu")
    own = torch.quantile(scores, levels, dim=1, keepdim=True)
    q = {"tracked": pooled, "bundle": own, "mix": (pooled + own) / 2}[s.quantiles]
    return q[0], q[1]


def baselined(
    scores: torch.Tensor, q: tuple[torch.Tensor, torch.Tensor], s: RiskPOSettings
) -> torch.Tensor:
    """Advantage of the draws [K, G] in score units, after the baseline."""
    a = risk_advantage(scores, q, s)
    if s.baseline == "leave-one-out":
        return left_one_out(a)
    return centred(a) if s.baseline == "batch" else a


def centred(a: torch.Tensor) -> torch.Tensor:
    """Each value minus the mean of all."""
    d = a - a.flatten()[0]
    return d - d.mean()


def scaled(a: torch.Tensor, scores: torch.Tensor, s: RiskPOSettings) -> torch.Tensor:
    """Advantage of the draws [K, G] over the spread of the scores."""
    if s.scale == "none":
        return a
    if s.scale == "batch-std":
        return a / (max(sample_std(scores.flatten()).item(), s.std_floor) + s.eps)
    std = sample_std(scores)[:, None]
    return a / (torch.where(std > TIED_STD, std, torch.ones_like(std)) + s.eps)

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

from riskpo_kernels.checks import describe, reject
from riskpo_kernels.credit import CREDITS
from riskpo_kernels.grouping import Question, group_rows, pair_rows
from riskpo_kernels.presets import OP, RiskPOSettings, settings_from
from riskpo_kernels.risk import (
    QuantileTracker,
    bundle_scores,
    cvar,
    mvar,
    mvar_advantage,
    official_monitor,
)

TIED_STD = 1e-9  # rounding in sums of rewards; a real spread of scores is far above it


class RiskPOAdvantage:
    """Advantage of every response from the risk of the bundles it sits in (arXiv 2510.00911).

    Presets (rows of riskpo_kernels.presets.PRESETS, whose fields are the overrides):
      "paper"          pooled tracked quantiles, seeded pairing, paper form, uniform credit
      "official-easy"  what the released code (RTkenny/RiskPO) runs on easy data: each bundle's own
                       quantiles, index pairing, w_mix form over the bundle's std, credit std
      "official-hard"  the same on hard data: credit sum-mean, beta 0.8, no natural baseline

    Overrides:
      form, alpha, beta, omega, w_mix, eps   as in `mvar_advantage`
      bundle_size   B
      quantiles     "tracked": those of the previous steps (QuantileTracker with tracker_step), at
                    the first step this batch's; "bundle": each bundle's own over its G papers,
                    linearly interpolated; "mix": the average of the two
      baseline      "natural": the form's constant (0 at and above q_beta; form mean: the bundle's
                    mean); "none"; "leave-one-out": "none" minus the mean over the bundle's other
                    papers; "batch": "none" minus the mean over all papers
      scale         "none"; "bundle-std": over (std of the bundle's G scores + eps), n - 1, 1 when
                    they tie; "batch-std": over (max(std of all scores, std_floor) + eps)
      credit        "uniform" | "score" | "std" | "sum-mean": see riskpo_kernels.credit
      pairing       "permuted": bundles and papers drawn from (seed, step, question id) alone;
                    "index": bundles in order of first appearance and j-th response to paper j, as
                    the official code does, so these do depend on the order of the rows
      leftover      Q not divisible by B: "error", or "drop" the surplus (advantage 0, not tracked,
                    counted in stats, warned about once)

    ValueError on an unknown name or value, or on scale="bundle-std" with an advantage that does not
    vanish where a bundle's papers tie (tracked quantiles): it would be divided by zero.
    """

    def __init__(self, preset: str = "paper", **overrides: Any) -> None:
        self.settings: RiskPOSettings = settings_from(preset, overrides)
        s = self.settings
        self._tracker = QuantileTracker((s.alpha, s.beta), s.tracker_step)
        self._used: torch.Tensor | None = None  # tracked quantiles that last_step worked with
        self._last_step: int | None = None
        self._warned = False

    def __call__(
        self, rewards: torch.Tensor, question_id: Any, *, step: int, draw: Any = None
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Advantage [N] (float32, detached, on the rewards' device) and this step's statistics.

        rewards [N], any real dtype; question_id [N], ints or strings, list or tensor; every
        question has the same number of responses and is one question wherever its rows stand.
        draw [N], ints, numbers the responses within a question; by default they count as they
        occur. With it, "permuted" results do not depend on the order of the rows at all; without
        it, not on the order between questions.

        step, an int that never falls: the tracked quantiles in use are those of earlier steps; a
        step above the last one moves the tracker once, after the advantages. The same step again
        (a retry, an evaluation) works with the same quantiles and moves nothing. Under data
        parallelism every rank passes the whole gathered batch. stats: see `batch_stats`.

        ValueError on non-finite rewards, ragged groups, a falling step, leftover questions (unless
        dropped), or one response per question where papers are only compared within their bundle
        (baseline="leave-one-out", quantiles="bundle", form="mean" with baseline="natural").
        """
        s = self.settings
        r = _checked_rewards(rewards)
        self._check_step(step)
        groups = group_rows(question_id, draw, r.numel())
        dropped = self._check_counts(groups)
        rows = pair_rows(
            groups, bundle_size=s.bundle_size, pairing=s.pairing, seed=s.seed, step=step
        )
        paper_rewards = r[rows]
        scores = bundle_scores(paper_rewards, s.bundle_size)
        tracked = self._tracked(scores, step)

        q = _quantiles(scores, tracked, s)
        a = scaled(baselined(scores, q, s), scores, s)
        by_bundle = paper_rewards.unflatten(0, (-1, s.bundle_size))
        advantage = torch.zeros_like(r)
        advantage[rows] = CREDITS[s.credit](a, by_bundle, s.eps).flatten(0, 1)

        moves = self._last_step is None or step > self._last_step
        if moves:
            self._tracker.update(scores)
            self._last_step, self._used = step, tracked
        stats = batch_stats(r, groups, scores, q, tracked, advantage, s)
        stats |= {"dropped_questions": float(dropped), "tracker_moved": float(moves)}
        return advantage.float().to(rewards.device), stats

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: tracker, last step and the quantiles it used, pairing seed."""
        return {
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

    def _check_counts(self, groups: dict[Question, list[int]]) -> int:
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
    """Advantage of the papers [K, G] in score units, after the baseline."""
    a = mvar_advantage(
        scores,
        *q,
        form=s.form,
        alpha=s.alpha,
        beta=s.beta,
        omega=s.omega,
        w_mix=s.w_mix,
        natural=s.baseline == "natural",
        eps=s.eps,
    )
    # Subtracting one of the values first makes equal advantages come out as exactly 0.
    if s.baseline == "leave-one-out":
        d = a - a[:, :1]
        return d - (d.sum(1, keepdim=True) - d) / (d.shape[1] - 1)
    if s.baseline == "batch":
        d = a - a[0, 0]
        return d - d.mean()
    return a


def scaled(a: torch.Tensor, scores: torch.Tensor, s: RiskPOSettings) -> torch.Tensor:
    """Advantage of the papers [K, G] over the spread of the scores."""
    if s.scale == "none":
        return a
    if s.scale == "batch-std":
        return a / (max(_std(scores.flatten()).item(), s.std_floor) + s.eps)
    std = _std(scores)[:, None]
    return a / (torch.where(std > TIED_STD, std, torch.ones_like(std)) + s.eps)


def _std(x: torch.Tensor) -> torch.Tensor:
    """Sample std (n - 1) of the last dimension, 0 for a single value."""
    return x.std(-1) if x.shape[-1] > 1 else torch.zeros_like(x[..., 0])


def batch_stats(
    r: torch.Tensor,
    groups: dict[Question, list[int]],
    scores: torch.Tensor,
    q: tuple[torch.Tensor, torch.Tensor],
    tracked: torch.Tensor,
    advantage: torch.Tensor,
    s: RiskPOSettings,
) -> dict[str, float]:
    """Numbers of one step; `scores` are the K * G papers' and rewards and advantages all N.

    q_alpha, q_beta                        quantiles in use, mean over bundles
    q_alpha_tracked, q_beta_tracked        those of the tracker before this step
    rvar_lower, mvar                       RVaR_{0:alpha} and MVaR of the scores
    monitor_rvar, _cvar, _mvar             `official_monitor` at the tracked quantiles
    reward_mean, bundle_score_mean, bundle_score_std
    tied_bundle_fraction                   bundles whose papers all have one score
    all_equal_question_fraction            questions whose rewards are all alike
    zero_advantage_fraction, advantage_mean, _min, _max
    bundles, and beside these dropped_questions and tracker_moved (1 or 0)
    """
    pooled = scores.flatten()
    by_question = r[torch.tensor(list(groups.values()), device="cpu")]
    monitor = official_monitor(pooled, tracked[0], tracked[1], w_mix=s.w_mix)
    values: dict[str, torch.Tensor | float] = {
        "q_alpha": q[0].mean(),
        "q_beta": q[1].mean(),
        "q_alpha_tracked": tracked[0],
        "q_beta_tracked": tracked[1],
        "rvar_lower": cvar(pooled, s.alpha),
        "mvar": mvar(pooled, s.alpha, s.beta, s.omega),
        "monitor_rvar": monitor.rvar,
        "monitor_cvar": monitor.cvar,
        "monitor_mvar": monitor.mvar,
        "reward_mean": r.mean(),
        "bundle_score_mean": pooled.mean(),
        "bundle_score_std": _std(pooled),
        "tied_bundle_fraction": (_std(scores) <= TIED_STD).double().mean(),
        "all_equal_question_fraction": _all_equal(by_question).double().mean(),
        "zero_advantage_fraction": (advantage == 0).double().mean(),
        "advantage_mean": advantage.mean(),
        "advantage_min": advantage.min(),
        "advantage_max": advantage.max(),
        "bundles": scores.shape[0],
    }
    return {name: float(value) for name, value in values.items()}


def _all_equal(x: torch.Tensor) -> torch.Tensor:
    return (x == x[..., :1]).all(-1)

"""RiskPOAdvantage of arXiv 2510.00911, one bundle, one paper, one response at a time, in float64.

Same names and signatures as riskpo_kernels.advantage; only the seeded order is shared with it.
Assumes valid arguments (of the refusals only the leftover rule matters to the result).
"""

from __future__ import annotations

from typing import Any

import torch

from riskpo_kernels.reference.pairing import draw_permutation, question_order
from riskpo_kernels.reference.risk import (
    QuantileTracker,
    interpolated,
    mean,
    mvar,
    mvar_advantage,
    official_monitor,
    rvar,
    sample_std,
)

PAPER: dict[str, Any] = {
    "form": "paper",
    "alpha": 0.2,
    "beta": 0.8,
    "omega": 0.5,
    "w_mix": 1.5,
    "eps": 0.0,
    "bundle_size": 5,
    "quantiles": "tracked",
    "tracker_step": 0.1,
    "credit": "uniform",
    "baseline": "natural",
    "scale": "none",
    "std_floor": 0.5,
    "pairing": "permuted",
    "leftover": "error",
    "seed": 0,
}
OFFICIAL: dict[str, Any] = PAPER | {
    "form": "official",
    "eps": 1e-6,
    "quantiles": "bundle",
    "scale": "bundle-std",
    "pairing": "index",
}
PRESETS = {
    "paper": PAPER,
    "official-easy": OFFICIAL | {"beta": 0.9, "credit": "std"},
    "official-hard": OFFICIAL | {"credit": "sum-mean", "baseline": "none"},
}
Rows = dict[str, list[int]]  # question -> its rows, by draw


class RiskPOAdvantage:
    """(rewards [N], question_id [N], step) -> (advantage [N], stats)."""

    def __init__(self, preset: str = "paper", **overrides: Any) -> None:
        self.o = PRESETS[preset] | overrides
        self.tracker = QuantileTracker((self.o["alpha"], self.o["beta"]), self.o["tracker_step"])
        self.used: list[float] = []
        self.last_step = -1

    def __call__(
        self, rewards: torch.Tensor, question_id: Any, *, step: int, draw: Any = None
    ) -> tuple[torch.Tensor, dict[str, float]]:
        o = self.o
        r = [float(x) for x in rewards.tolist()]
        rows = rows_of_questions(question_id, draw)
        bundles = form_bundles(rows, o, step)
        if sum(len(bundle) for bundle in bundles) < len(rows) and o["leftover"] == "error":
            raise ValueError("reference.RiskPOAdvantage: bundle_size does not divide the questions")
        papers = [pair(bundle, rows, o, step) for bundle in bundles]
        scores = [[sum(r[row] for row in paper) for paper in bundle] for bundle in papers]
        pooled = [score for bundle in scores for score in bundle]

        if step > self.last_step:
            self.used = self.quantiles_before(pooled)
        q = [quantiles_of(bundle, self.used, o) for bundle in scores]
        a = [paper_advantages(bundle, *q_k, o) for bundle, q_k in zip(scores, q, strict=True)]
        a = baseline(a, o)
        a = scale(a, scores, o)

        advantage = [0.0] * len(r)
        for k, bundle in enumerate(papers):
            for j, paper in enumerate(bundle):
                for row, share in zip(paper, credit(a[k][j], paper, r, rows, o), strict=True):
                    advantage[row] = share
        moved = step > self.last_step
        if moved:
            self.tracker.update(torch.tensor(pooled, dtype=torch.float64))
            self.last_step = step
        stats = statistics(r, rows, scores, q, self.used, advantage, o)
        stats["dropped_questions"] = float(len(rows) - sum(len(b) for b in bundles))
        stats["tracker_moved"] = float(moved)
        return torch.tensor(advantage).float(), stats

    def quantiles_before(self, pooled: list[float]) -> list[float]:
        """The tracked pair from earlier steps; this batch's own where there was none."""
        if self.tracker.initialised:
            return self.tracker.values.tolist()
        return [interpolated(pooled, level) for level in self.tracker.levels]

    def state_dict(self) -> dict[str, Any]:
        state = {"used": list(self.used), "last_step": self.last_step, "seed": self.o["seed"]}
        return state | {"tracker": self.tracker.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state["tracker"])
        self.used, self.last_step = list(state["used"]), state["last_step"]
        self.o = self.o | {"seed": state["seed"]}


def rows_of_questions(question_id: Any, draw: Any) -> Rows:
    """Rows by question in order of appearance, each question's sorted by draw."""
    ids = question_id.tolist() if isinstance(question_id, torch.Tensor) else list(question_id)
    draws = draw.tolist() if isinstance(draw, torch.Tensor) else draw
    rows: Rows = {}
    for row, q in enumerate(ids):
        rows.setdefault(f"s:{q}" if isinstance(q, str) else f"i:{int(q)}", []).append(row)
    if draws is not None:
        rows = {name: sorted(group, key=lambda row: draws[row]) for name, group in rows.items()}
    return rows


def form_bundles(rows: Rows, o: dict[str, Any], step: int) -> list[list[str]]:
    """Whole bundles of question names."""
    order = list(rows)
    if o["pairing"] == "permuted":
        order = question_order(order, seed=o["seed"], step=step)
    size = o["bundle_size"]
    return [order[k * size : (k + 1) * size] for k in range(len(order) // size)]


def pair(bundle: list[str], rows: Rows, o: dict[str, Any], step: int) -> list[list[int]]:
    """Papers of one bundle: paper j holds row xi_i(j) of each of its questions i."""
    draws = len(rows[bundle[0]])
    xi = {name: list(range(draws)) for name in bundle}
    if o["pairing"] == "permuted":
        xi = {name: draw_permutation(name, draws, seed=o["seed"], step=step) for name in bundle}
    return [[rows[name][xi[name][j]] for name in bundle] for j in range(draws)]


def quantiles_of(
    bundle: list[float], tracked: list[float], o: dict[str, Any]
) -> tuple[float, float]:
    """(q_alpha, q_beta) that one bundle works with."""
    own = [interpolated(bundle, o["alpha"]), interpolated(bundle, o["beta"])]
    if o["quantiles"] == "tracked":
        return tracked[0], tracked[1]
    if o["quantiles"] == "bundle":
        return own[0], own[1]
    return (tracked[0] + own[0]) / 2, (tracked[1] + own[1]) / 2


def paper_advantages(
    bundle: list[float], q_alpha: float, q_beta: float, o: dict[str, Any]
) -> list[float]:
    """A(R) of one bundle's papers, with the form's own constant only under baseline natural."""
    options = {name: o[name] for name in ("form", "alpha", "beta", "omega", "w_mix", "eps")}
    r = torch.tensor(bundle, dtype=torch.float64)
    natural = o["baseline"] == "natural"
    return mvar_advantage(r, q_alpha, q_beta, natural=natural, **options).tolist()


def baseline(a: list[list[float]], o: dict[str, Any]) -> list[list[float]]:
    """Subtract the mean of the other papers of the bundle, or of all papers."""
    if o["baseline"] == "leave-one-out":
        return [[x - mean(k[:j] + k[j + 1 :]) for j, x in enumerate(k)] for k in a]
    if o["baseline"] == "batch":
        centre = mean([x for k in a for x in k])
        return [[x - centre for x in k] for k in a]
    return a


def scale(a: list[list[float]], scores: list[list[float]], o: dict[str, Any]) -> list[list[float]]:
    """Divide by the spread of the scores."""
    if o["scale"] == "bundle-std":
        divisors = [sample_std(k) for k in scores]
        divisors = [(d if d > 1e-9 else 1.0) + o["eps"] for d in divisors]
    elif o["scale"] == "batch-std":
        all_std = sample_std([x for k in scores for x in k])
        divisors = [max(all_std, o["std_floor"]) + o["eps"]] * len(a)
    else:
        divisors = [1.0] * len(a)
    return [[x / d for x in k] for k, d in zip(a, divisors, strict=True)]


def credit(
    a: float, paper: list[int], r: list[float], rows: Rows, o: dict[str, Any]
) -> list[float]:
    """What each response of one paper gets of the paper's advantage."""
    group_of = {row: group for group in rows.values() for row in group if row in paper}
    rewards = {row: [r[other] for other in group_of[row]] for row in paper}
    if o["credit"] == "score":
        return [0.5 * a if r[row] > 0 else 1.5 * a for row in paper]
    if o["credit"] == "std":
        sigmas = [sample_std(rewards[row]) for row in paper]
        return [a / ((sigma if sigma > 1e-3 else 1.0) + o["eps"]) for sigma in sigmas]
    if o["credit"] == "sum-mean":
        ratios = [r[row] - mean(rewards[row]) for row in paper]
        total = sum(ratios)
        if abs(total) <= 1e-6:
            return [a / len(paper)] * len(paper)
        return [a * ratio / total for ratio in ratios]
    return [a] * len(paper)


def statistics(
    r: list[float],
    rows: Rows,
    scores: list[list[float]],
    q: list[tuple[float, float]],
    tracked: list[float],
    advantage: list[float],
    o: dict[str, Any],
) -> dict[str, float]:
    """The op's stats by name."""
    pooled = [score for bundle in scores for score in bundle]
    x = torch.tensor(pooled, dtype=torch.float64)
    monitor = official_monitor(x, tracked[0], tracked[1], w_mix=o["w_mix"])
    alike = [len({r[row] for row in group}) == 1 for group in rows.values()]
    return {
        "q_alpha": mean([pair[0] for pair in q]),
        "q_beta": mean([pair[1] for pair in q]),
        "q_alpha_tracked": tracked[0],
        "q_beta_tracked": tracked[1],
        "rvar_lower": rvar(x, 0.0, o["alpha"]).item(),
        "mvar": mvar(x, o["alpha"], o["beta"], o["omega"]).item(),
        "monitor_rvar": monitor.rvar.item(),
        "monitor_cvar": monitor.cvar.item(),
        "monitor_mvar": monitor.mvar.item(),
        "reward_mean": mean(r),
        "bundle_score_mean": mean(pooled),
        "bundle_score_std": sample_std(pooled),
        "tied_bundle_fraction": mean([float(sample_std(k) <= 1e-9) for k in scores]),
        "all_equal_question_fraction": mean([float(x) for x in alike]),
        "zero_advantage_fraction": mean([float(abs(x) < 1e-12) for x in advantage]),
        "advantage_mean": mean(advantage),
        "advantage_min": min(advantage),
        "advantage_max": max(advantage),
        "bundles": float(len(scores)),
    }

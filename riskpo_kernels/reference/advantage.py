"""RiskPOAdvantage of arXiv 2510.00911, one bundle, one draw, one response at a time, in float64.

Same names and signatures as riskpo_kernels.advantage; only the seeded order is shared with it.
Assumes valid arguments (of the refusals only the leftover rule matters to the result).
"""

from __future__ import annotations

from typing import Any

import torch

from riskpo_kernels.reference.conditional import Bundling, Rows, conditional
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
    "bundling": "random",
    "difficulty": "history",
    "history_rate": 0.3,
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
    "matched": PAPER
    | {"credit": "conditional", "bundling": "matched", "baseline": "leave-one-out"},
    "official-easy": OFFICIAL | {"beta": 0.9, "credit": "std"},
    "official-hard": OFFICIAL | {"credit": "sum-mean", "baseline": "none"},
}


class RiskPOAdvantage:
    """(rewards [N], question_id [N], step) -> (advantage [N], stats)."""

    def __init__(self, preset: str = "paper", **overrides: Any) -> None:
        self.o = PRESETS[preset] | overrides
        self.tracker = QuantileTracker((self.o["alpha"], self.o["beta"]), self.o["tracker_step"])
        self.used: list[float] = []
        self.history: dict[str, float] = {}  # mean reward by question, exponential
        self.known: dict[str, float] = {}  # the history as the last step found it
        self.last_step = -1

    def __call__(
        self,
        rewards: torch.Tensor,
        question_id: Any,
        *,
        step: int,
        draw: Any = None,
        prior: Any = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        o = self.o
        r = [float(x) for x in rewards.tolist()]
        rows = rows_of_questions(question_id, draw)
        if step > self.last_step:
            self.known = dict(self.history)
        bundlings = self.bundlings(r, rows, step, prior)
        kept = sum(len(bundle) for bundle in bundlings[0][0])
        if kept < len(rows) and o["leftover"] == "error":
            raise ValueError("reference.RiskPOAdvantage: bundle_size does not divide the questions")
        more: dict[str, float] = {}
        drawn, scores = [], []  # by bundling, by bundle, by draw
        for bundles, own in bundlings:
            drawn.append([pair(bundle, own, o, step) for bundle in bundles])
            scores.append([[sum(r[i] for i in p) for p in bundle] for bundle in drawn[-1]])
        joined: list[list[float]] = [sum(parts, []) for parts in zip(*scores, strict=True)]
        pooled = [score for bundle in joined for score in bundle]

        if step > self.last_step:
            self.used = self.quantiles_before(pooled)
        q = [quantiles_of(bundle, self.used, o) for bundle in joined]
        if o["credit"] == "conditional":
            found, more = conditional(r, bundlings, lambda x: draw_advantages(x, *q[0], o), o)
            shares = dict(zip(found, scale([list(found.values())], joined, o)[0], strict=True))
            advantage = [shares.get(row, 0.0) for row in range(len(r))]
        else:
            a = [draw_advantages(bundle, *q_k, o) for bundle, q_k in zip(joined, q, strict=True)]
            a = scale(baseline(a, o), joined, o)
            advantage = [0.0] * len(r)
            for k, bundle in enumerate(drawn[0]):
                for j, one in enumerate(bundle):
                    for row, x in zip(one, credit(a[k][j], one, r, rows, o), strict=True):
                        advantage[row] = x
        moved = step > self.last_step
        if moved:
            self.tracker.update(torch.tensor(pooled, dtype=torch.float64))
            self.last_step = step
            for name, group in rows.items():
                now = mean([r[row] for row in group])
                before = self.history.get(name, now)
                self.history[name] = (1 - o["history_rate"]) * before + o["history_rate"] * now
        stats = more | statistics(r, rows, joined, q, self.used, advantage, o)
        if o["bundling"] == "matched" and o["difficulty"] == "history":
            stats["history_known_fraction"] = mean([float(name in self.known) for name in rows])
        stats["dropped_questions"] = float(len(rows) - kept)
        stats["tracker_moved"] = float(moved)
        return torch.tensor(advantage).float(), stats

    def bundlings(self, r: list[float], rows: Rows, step: int, prior: Any) -> list[Bundling]:
        """(bundles, rows of each question in them): one, or one for each half."""
        o = self.o
        if o["bundling"] == "random":
            return [(form_bundles(rows, o, step, None), rows)]
        if o["difficulty"] == "prior":
            given = {name: float(prior[group[0]]) for name, group in rows.items()}
            return [(form_bundles(rows, o, step, given), rows)]
        if o["difficulty"] == "history":
            seen = [self.known[name] for name in rows if name in self.known]
            unseen = mean(seen) if seen else 0.0
            given = {name: self.known.get(name, unseen) for name in rows}
            return [(form_bundles(rows, o, step, given), rows)]
        order: dict[str, list[int]] = {}
        for name, group in rows.items():
            xi = list(range(len(group)))
            if o["pairing"] == "permuted":
                xi = draw_permutation(name, len(group), seed=o["seed"], step=step)
            order[name] = [group[j] for j in xi]
        half = len(next(iter(order.values()))) // 2
        first = {name: group[:half] for name, group in order.items()}
        second = {name: group[half:] for name, group in order.items()}
        found = []
        for own, other in ((first, second), (second, first)):
            given = {name: mean([r[row] for row in other[name]]) for name in rows}
            found.append((form_bundles(rows, o, step, given), own))
        return found

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


def form_bundles(
    rows: Rows, o: dict[str, Any], step: int, difficulty: dict[str, float] | None
) -> list[list[str]]:
    """Whole bundles of question names; with a difficulty, like beside like."""
    order = list(rows)
    if o["pairing"] == "permuted":
        order = question_order(order, seed=o["seed"], step=step)
    size = o["bundle_size"]
    order = order[: len(order) // size * size]
    if difficulty is not None:
        order = sorted(order, key=lambda name: difficulty[name])
    return [order[k : k + size] for k in range(0, len(order), size)]


def pair(bundle: list[str], rows: Rows, o: dict[str, Any], step: int) -> list[list[int]]:
    """Draws of one bundle: draw j holds row xi_i(j) of each of its questions i."""
    draws = len(rows[bundle[0]])
    xi = {name: list(range(draws)) for name in bundle}
    halved = o["bundling"] == "matched" and o["difficulty"] == "cross-fit"  # permuted before
    if o["pairing"] == "permuted" and not halved:
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


def draw_advantages(
    bundle: list[float], q_alpha: float, q_beta: float, o: dict[str, Any]
) -> list[float]:
    """A(R) of one bundle's draws, with the form's own constant only under baseline natural."""
    options = {name: o[name] for name in ("form", "alpha", "beta", "omega", "w_mix", "eps")}
    r = torch.tensor(bundle, dtype=torch.float64)
    natural = o["baseline"] == "natural"
    return mvar_advantage(r, q_alpha, q_beta, natural=natural, **options).tolist()


def baseline(a: list[list[float]], o: dict[str, Any]) -> list[list[float]]:
    """Subtract the mean of the other draws of the bundle, or of all draws."""
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
    a: float, drawn: list[int], r: list[float], rows: Rows, o: dict[str, Any]
) -> list[float]:
    """What each response of one draw gets of the draw's advantage."""
    group_of = {row: group for group in rows.values() for row in group if row in drawn}
    rewards = {row: [r[other] for other in group_of[row]] for row in drawn}
    if o["credit"] == "score":
        return [0.5 * a if r[row] > 0 else 1.5 * a for row in drawn]
    if o["credit"] == "std":
        sigmas = [sample_std(rewards[row]) for row in drawn]
        return [a / ((sigma if sigma > 1e-3 else 1.0) + o["eps"]) for sigma in sigmas]
    if o["credit"] == "sum-mean":
        ratios = [r[row] - mean(rewards[row]) for row in drawn]
        total = sum(ratios)
        if abs(total) <= 1e-6:
            return [a / len(drawn)] * len(drawn)
        return [a * ratio / total for ratio in ratios]
    return [a] * len(drawn)


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

"""The risk objective of arXiv 2510.00911 in scalars and loops: one score at a time, float64.

Same names and signatures as riskpo_kernels.risk; nothing here is shared with it. Assumes valid
arguments. Returns float64 tensors on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Number = float | torch.Tensor


class MonitorRisk(NamedTuple):
    """The official trainer's risk curves."""

    rvar: torch.Tensor
    cvar: torch.Tensor
    mvar: torch.Tensor


def rvar(scores: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """1 / (b - a) * integral_a^b F^-1(u) du of the last dimension: [..., n] -> [...]."""
    return _per_row(scores, lambda row: _integral(row, a, b) / (b - a))


def cvar(scores: torch.Tensor, a: float) -> torch.Tensor:
    """RVaR_{0:a}: [..., n] -> [...]."""
    return rvar(scores, 0.0, a)


def mvar(scores: torch.Tensor, alpha: float, beta: float, omega: float) -> torch.Tensor:
    """(1 + omega) alpha RVaR_{0:alpha} + (beta - alpha) RVaR_{alpha:beta}: [..., n] -> [...]."""
    tail, middle = rvar(scores, 0.0, alpha), rvar(scores, alpha, beta)
    return (1 + omega) * alpha * tail + (beta - alpha) * middle


def mvar_advantage(
    scores: torch.Tensor,
    q_alpha: Number,
    q_beta: Number,
    *,
    form: str = "paper",
    alpha: float = 0.2,
    beta: float = 0.8,
    omega: float = 0.5,
    w_mix: float = 1.5,
    natural: bool = True,
    eps: float = 0.0,
) -> torch.Tensor:
    """A(R) for every score; the formulas as the sources print them."""
    r = scores.detach().cpu().double()
    lows, highs = spread(q_alpha, r), spread(q_beta, r)
    n = r.shape[-1]
    out = []
    for i, (x, q_a, q_b) in enumerate(zip(r.reshape(-1).tolist(), lows, highs, strict=True)):
        q_b = max(q_a, q_b)
        g = positive(x - q_a) - positive(x - q_b) + (q_a - q_b if natural else 0.0)
        low = -positive(q_a - x)
        if form == "paper":
            out.append((1 + omega) * low + g)
        elif form == "official":
            mid = g / (beta - alpha + eps)
            out.append((w_mix * low / (alpha + eps) + mid) / (w_mix + 1))
        elif form == "seeking":
            up = positive(x - q_b) / (1 - beta + eps)
            out.append((w_mix * up + g / (beta - alpha + eps)) / (w_mix + 1))
        else:  # "mean"
            row = r.reshape(-1, n)[i // n].tolist()
            out.append(x - (mean(row) if natural else 0.0))
    return torch.tensor(out, dtype=torch.float64).reshape(r.shape)


def official_monitor(
    scores: torch.Tensor, q_alpha: Number, q_beta: Number, *, w_mix: float = 1.5
) -> MonitorRisk:
    """Conditional means over closed sets, with the overall mean where a set is empty."""
    r = scores.cpu().double()
    lows, highs = spread(q_alpha, r[..., :1]), spread(q_beta, r[..., :1])
    middles, tails = [], []
    for row, q_a, q_b in zip(r.reshape(-1, r.shape[-1]).tolist(), lows, highs, strict=True):
        middles.append(mean([x for x in row if q_a <= x <= q_b] or row))
        tails.append(mean([x for x in row if x <= q_a] or row))
    mixed = [(w_mix * t + m) / (w_mix + 1) for t, m in zip(tails, middles, strict=True)]
    table = torch.tensor([middles, tails, mixed], dtype=torch.float64)
    return MonitorRisk(*table.reshape(3, *r.shape[:-1]))


def bundle_scores(
    rewards: torch.Tensor, bundle_size: int, *, permutation: torch.Tensor | None = None
) -> torch.Tensor:
    """R_{k,j} = sum over the questions i of bundle k of rewards[i, xi_i(j)]: [Q, G] -> [K, G]."""
    r, (questions, draws) = rewards.tolist(), rewards.shape
    xi = [list(range(draws))] * questions if permutation is None else permutation.tolist()
    table = []
    for first in range(0, questions, bundle_size):
        members = range(first, first + bundle_size)
        table.append([float(sum(r[i][xi[i][j]] for i in members)) for j in range(draws)])
    return torch.tensor(table, dtype=torch.float64)


def pass_at_k(n: int | torch.Tensor, c: int | torch.Tensor, k: int) -> float | torch.Tensor:
    """1 - C(n - c, k) / C(n, k), by exact binomials."""
    if isinstance(n, int) and isinstance(c, int):
        return 1 - math.comb(n - c, k) / math.comb(n, k)
    n_all, c_all = torch.broadcast_tensors(torch.as_tensor(n), torch.as_tensor(c))
    pairs = zip(n_all.reshape(-1).tolist(), c_all.reshape(-1).tolist(), strict=True)
    flat = [1 - math.comb(m - w, k) / math.comb(m, k) for m, w in pairs]
    return torch.tensor(flat, dtype=torch.float64).reshape(n_all.shape)


class QuantileTracker:
    """q <- q + step * (level - share of scores strictly below q); the first batch sets q."""

    def __init__(self, levels: tuple[float, ...] = (0.2, 0.8), step: float = 0.1) -> None:
        self.levels, self.step = tuple(levels), step
        self.raw: list[float] | None = None

    @property
    def initialised(self) -> bool:
        return self.raw is not None

    @property
    def values(self) -> torch.Tensor:
        """[levels], each at least as large as those before it."""
        if self.raw is None:
            raise ValueError("reference.QuantileTracker: call update(scores) first")
        ordered = [max(self.raw[: i + 1]) for i in range(len(self.raw))]
        return torch.tensor(ordered, dtype=torch.float64)

    def update(self, scores: torch.Tensor) -> None:
        x = scores.reshape(-1).tolist()
        if self.raw is None:
            self.raw = [interpolated(x, level) for level in self.levels]
            return
        for i, level in enumerate(self.levels):
            below = sum(1 for score in x if score < self.raw[i]) / len(x)
            self.raw[i] += self.step * (level - below)

    def state_dict(self) -> dict[str, Any]:
        raw = None if self.raw is None else list(self.raw)
        return {"levels": list(self.levels), "step": self.step, "quantiles": raw}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.raw = None if state["quantiles"] is None else list(state["quantiles"])


def positive(x: float) -> float:
    """(x)^+."""
    return max(x, 0.0)


def spread(q: Number, r: torch.Tensor) -> list[float]:
    """One quantile per element of r."""
    q = torch.as_tensor(q, dtype=torch.float64).cpu()
    return q.expand(r.shape).reshape(-1).tolist()


def mean(xs: list[float]) -> float:
    """Arithmetic mean."""
    return sum(xs) / len(xs)


def sample_std(xs: list[float]) -> float:
    """Standard deviation with n - 1; 0 for a single value."""
    if len(xs) < 2:
        return 0.0
    centre = mean(xs)
    return math.sqrt(sum((x - centre) ** 2 for x in xs) / (len(xs) - 1))


def interpolated(xs: list[float], level: float) -> float:
    """Quantile by linear interpolation at position level * (n - 1) of the sorted values."""
    ordered = sorted(xs)
    position = level * (len(xs) - 1)
    i = math.floor(position)
    j = min(i + 1, len(xs) - 1)
    return ordered[i] + (position - i) * (ordered[j] - ordered[i])


def _integral(row: list[float], a: float, b: float) -> float:
    total, n = 0.0, len(row)
    for i, x in enumerate(sorted(row)):
        total += x * max(0.0, min((i + 1) / n, b) - max(i / n, a))
    return total


def _per_row(scores: torch.Tensor, value: Callable[[list[float]], float]) -> torch.Tensor:
    rows = scores.detach().cpu().double().reshape(-1, scores.shape[-1]).tolist()
    flat = torch.tensor([value(row) for row in rows], dtype=torch.float64)
    return flat.reshape(scores.shape[:-1])

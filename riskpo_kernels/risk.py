"""Risk measures of bundle scores, their advantages, and the quantiles they need.

With F the distribution of the scores and F^-1(u) = inf{r : F(r) >= u} (arXiv 2510.00911):

    RVaR_{a:b} = 1 / (b - a) * integral_a^b F^-1(u) du             CVaR_a = RVaR_{0:a}
    MVaR       = (1 + omega) * integral_0^alpha F^-1 + integral_alpha^beta F^-1
    A(R)       = -(1 + omega) (q_alpha - R)^+ + clip(R, q_alpha, q_beta) - q_beta

The quantile integral, unlike a conditional mean, gives an atom at a quantile its exact share.

scores, q_*     float16 to float64, integers, bool; computed in at least float32
results         float32, or float64 for float64 scores
cost            one sort over the last dimension; a few thousand scores, so no kernel is warranted
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from riskpo_kernels.core.checks import check_flags, check_positive, describe, reject
from riskpo_kernels.core.risk_checks import (
    as_permutation,
    as_quantile,
    check_range,
    check_risk,
    finite,
    widened,
)


class MonitorRisk(NamedTuple):
    """What `official_monitor` returns, each of shape [...]."""

    rvar: torch.Tensor
    cvar: torch.Tensor
    mvar: torch.Tensor


def rvar(scores: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """Range value-at-risk of the last dimension: scores [..., n] -> [...], in score units.

    Exact for the empirical distribution, ties included: with x_(i) the sorted scores,
    sum_i x_(i) * length([(i-1)/n, i/n] intersected with [a, b]) / (b - a). Differentiable.
    arXiv 2510.00911, definition of RVaR. ValueError unless 0 <= a < b <= 1, n >= 1 and every
    score is finite (the check waits for the device).
    """
    check_range("rvar", "a", a, "b", b)
    return _quantile_integral(finite("rvar", scores), a, b) / (b - a)


def cvar(scores: torch.Tensor, a: float) -> torch.Tensor:
    """Lower-tail conditional value-at-risk RVaR_{0:a}: scores [..., n] -> [...], in score units.

    The mean of the worst share `a` of the scores; a = 1 is the mean. Errors as `rvar`, 0 < a <= 1.
    """
    check_range("cvar", "0", 0.0, "a", a)
    return _quantile_integral(finite("cvar", scores), 0.0, a) / a


def mvar(scores: torch.Tensor, alpha: float, beta: float, omega: float) -> torch.Tensor:
    """Mixed value-at-risk: scores [..., n] -> [...], in score units times probability.

    (1 + omega) * alpha * RVaR_{0:alpha} + (beta - alpha) * RVaR_{alpha:beta}; mass above beta has
    no weight. omega = 0 and beta = 1 is the mean. arXiv 2510.00911, definition of MVaR.
    ValueError unless 0 < alpha < beta <= 1 and omega >= 0; otherwise as `rvar`.
    """
    check_risk("mvar", form="paper", alpha=alpha, beta=beta, omega=omega)
    x = finite("mvar", scores)
    return (1 + omega) * _quantile_integral(x, 0.0, alpha) + _quantile_integral(x, alpha, beta)


def mvar_advantage(
    scores: torch.Tensor,
    q_alpha: float | torch.Tensor,
    q_beta: float | torch.Tensor,
    *,
    form: str = "paper",
    alpha: float = 0.2,
    beta: float = 0.8,
    omega: float = 0.5,
    w_mix: float = 1.5,
    natural: bool = True,
    eps: float = 0.0,
) -> torch.Tensor:
    """Advantage of each score, detached, shape of `scores`; the weight of the score function.

    q_alpha and q_beta, in score units, are numbers, one-element tensors, or have the dimensions of
    scores with broadcastable sizes ([K, 1] for one pair per bundle). A q_beta below q_alpha counts
    as q_alpha. With mid = clip(R, q_alpha, q_beta) - q_beta if natural, else - q_alpha:

      "paper"     -(1 + omega) (q_alpha - R)^+ + mid      arXiv 2510.00911, Theorem 1
      "official"  (w_mix low + mid / (beta - alpha + eps)) / (w_mix + 1) with
                  low = -(q_alpha - R)^+ / (alpha + eps): the official code (RTkenny/RiskPO).
                  Equals c * paper(omega') for omega' = w_mix (beta - alpha) / alpha - 1 and
                  c = 1 / ((1 + w_mix) (beta - alpha)); w_mix = 0 is RVaR alone.
      "seeking"   (w_mix up + mid / (beta - alpha + eps)) / (w_mix + 1) with
                  up = (R - q_beta)^+ / (1 - beta + eps): the official code's risk-seeking variant
                  (the paper's own formula is not published), mirror image of "official"
      "mean"      R, minus its mean over the last dimension if natural; the quantiles are not used

    natural=True makes the averse forms 0 at and above q_beta and negative below.
    eps is the official code's 1e-6 beside its divisors; 0 is the formula itself. NaN propagates.
    ValueError on an unknown form, 0 < alpha < beta <= 1 violated (seeking: beta < 1; official:
    alpha >= 1e-3), negative omega, w_mix or eps, or quantiles of another shape.
    """
    op = "mvar_advantage"
    check_flags(op, natural=natural)
    check_risk(op, form=form, alpha=alpha, beta=beta, omega=omega, w_mix=w_mix, eps=eps)
    r = widened(op, "scores", scores).detach()
    if form == "mean":
        return _centred(r) if natural else r.clone()
    q_lo = as_quantile(op, "q_alpha", q_alpha, r)
    q_hi = torch.maximum(as_quantile(op, "q_beta", q_beta, r), q_lo)

    below = (q_lo - r).clamp(min=0)
    mid = torch.minimum(torch.maximum(r, q_lo), q_hi) - (q_hi if natural else q_lo)
    if form == "paper":
        return mid - (1 + omega) * below
    mid = mid / (beta - alpha + eps)
    if form == "official":
        return (mid - w_mix * below / (alpha + eps)) / (w_mix + 1)
    above = (r - q_hi).clamp(min=0)
    return (mid + w_mix * above / (1 - beta + eps)) / (w_mix + 1)


def official_monitor(
    scores: torch.Tensor,
    q_alpha: float | torch.Tensor,
    q_beta: float | torch.Tensor,
    *,
    w_mix: float = 1.5,
) -> MonitorRisk:
    """The risk curves as the official trainer logs them: scores [..., n] -> three of [...].

    rvar: mean of the scores in [q_alpha, q_beta], both ends closed; cvar: mean of those at or below
    q_alpha; an empty set falls back to the overall mean; mvar = (w_mix cvar + rvar) / (w_mix + 1).
    An atom at q_alpha counts in both, so the values differ from `rvar` and `mvar`: use these only
    beside the paper's figures. Quantiles as in `mvar_advantage`. Official code, ray_trainer.py.
    """
    op = "official_monitor"
    check_positive(op, "w_mix", w_mix, zero_ok=True)
    x = finite(op, scores)
    q_lo, q_hi = as_quantile(op, "q_alpha", q_alpha, x), as_quantile(op, "q_beta", q_beta, x)
    middle = _mean_where(x, (x >= q_lo) & (x <= q_hi))
    tail = _mean_where(x, x <= q_lo)
    return MonitorRisk(middle, tail, (w_mix * tail + middle) / (w_mix + 1))


def bundle_scores(
    rewards: torch.Tensor, bundle_size: int, *, permutation: torch.Tensor | None = None
) -> torch.Tensor:
    """Scores of the draws: rewards [Q, G] -> [K, G], K = Q / bundle_size, in reward units.

    Consecutive questions form a bundle; draw j of a bundle sums rewards[i, permutation[i, j]] over
    its questions i (arXiv 2510.00911, bundling; without a permutation the j-th response, as in the
    official code). permutation is int [Q, G], each row a permutation of 0..G-1.
    ValueError when bundle_size does not divide Q or a row of permutation is none.
    """
    op = "bundle_scores"
    r = widened(op, "rewards", rewards)
    if r.ndim != 2:
        reject(op, f"rewards = {describe(rewards)}", "shape [Q, G]", "Reshape rewards first.")
    if not isinstance(bundle_size, int) or isinstance(bundle_size, bool) or bundle_size < 1:
        reject(op, f"bundle_size={bundle_size!r}", "an int of at least 1", "Set bundle_size.")
    if r.shape[0] % bundle_size:
        reject(
            op,
            f"Q = {r.shape[0]} questions with bundle_size={bundle_size}",
            "a multiple of bundle_size",
            f"Leave out {r.shape[0] % bundle_size} or choose another bundle_size.",
        )
    if permutation is not None:
        r = r.gather(1, as_permutation(op, permutation, r))
    return r.unflatten(0, (-1, bundle_size)).sum(1)


def pass_at_k(n: int | torch.Tensor, c: int | torch.Tensor, k: int) -> float | torch.Tensor:
    """Unbiased pass@k of n samples of which c are right: 1 - C(n-c, k) / C(n, k), in [0, 1].

    n and c are ints (returns a float) or integer tensors that broadcast (returns float64, that
    shape); average over problems yourself. ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    for name, x in (("n", n), ("c", c)):
        whole = isinstance(x, torch.Tensor) and not x.is_floating_point() and not x.is_complex()
        if not whole and (not isinstance(x, int) or isinstance(x, bool)):
            reject("pass_at_k", f"{name} = {describe(x)}", "an int or int tensor", "Count samples.")
    n_all, c_all = torch.as_tensor(n), torch.as_tensor(c)
    bad = (c_all < 0) | (c_all > n_all) | (n_all < k)
    if not isinstance(k, int) or isinstance(k, bool) or k < 1 or bool(bad.any()):
        came = f"n={_brief(n)}, c={_brief(c)}, k={k!r}"
        reject("pass_at_k", came, "0 <= c <= n and 1 <= k <= n", "Draw at least k samples.")
    i = torch.arange(k, dtype=torch.float64, device=(n_all + c_all).device)
    # A sum of k logarithms of 1 - c / (n - i), -inf once n - c < k: neither binomials, nor a
    # product that is subtracted from 1, which for c much below n leaves few digits.
    share = (c_all.double()[..., None] / (n_all.double()[..., None] - i)).clamp(max=1)
    result = -torch.expm1(torch.log1p(-share).sum(-1))
    return result if isinstance(n, torch.Tensor) or isinstance(c, torch.Tensor) else result.item()


class QuantileTracker:
    """Quantiles of a moving stream of scores, one level each, by stochastic approximation.

    The first `update` sets each quantile to the batch's, linearly interpolated; each later one
    moves it by step * (level - share of scores < quantile), strictly below (arXiv 2510.00911,
    quantile tracking; `step` in score units). Scores within [m, M] keep a quantile of level s
    within [m - step (1 - s), M + step s]; it rises at most step * s per update.

    Every level follows its own recursion; only `values` puts them in order (running maximum).
    State is float64 on the CPU, so every rank and every resumed run holds the same bits.
    ValueError unless levels increase strictly within (0, 1] and step > 0.
    """

    def __init__(self, levels: tuple[float, ...] = (0.2, 0.8), step: float = 0.1) -> None:
        levels = tuple(float(s) for s in levels)
        rising = all(s < t for s, t in zip((0.0, *levels), levels, strict=False))
        if not levels or not rising or levels[-1] > 1:
            todo = "Sort them and drop repeats."
            reject("QuantileTracker", f"levels={levels}", "rising levels in (0, 1]", todo)
        check_positive("QuantileTracker", "step", step)
        self.levels, self.step = levels, float(step)
        self._raw: torch.Tensor | None = None

    @property
    def initialised(self) -> bool:
        """Whether a batch has been seen."""
        return self._raw is not None

    @property
    def values(self) -> torch.Tensor:
        """Tracked quantiles [len(levels)], float64 on the CPU, never falling with the level."""
        if self._raw is None:
            todo = "Call update(scores) first."
            reject("QuantileTracker.values", "no scores yet", "at least one update", todo)
        return self._raw.cummax(0).values

    def update(self, scores: torch.Tensor) -> None:
        """One step on all scores, any shape, pooled. ValueError on none or on non-finite ones."""
        x = finite("QuantileTracker.update", scores.reshape(-1)).detach().cpu().double()
        level = torch.tensor(self.levels, dtype=torch.float64, device="cpu")
        if self._raw is None:
            self._raw = torch.quantile(x, level)
            return
        below = (x < self._raw[:, None]).sum(1).double() / x.numel()
        self._raw = self._raw + self.step * (level - below)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: fit for JSON and for torch.load(weights_only=True)."""
        raw = None if self._raw is None else self._raw.tolist()
        return {"levels": list(self.levels), "step": self.step, "quantiles": raw}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; ValueError when it tracked other levels or another step."""
        mine = (list(self.levels), self.step)
        if (list(state["levels"]), state["step"]) != mine:
            came = f"levels={state['levels']}, step={state['step']}"
            expected = f"levels={mine[0]}, step={mine[1]}"
            todo = "Build it with the settings of the saved run."
            reject("QuantileTracker.load_state_dict", came, expected, todo)
        raw = state["quantiles"]
        self._raw = None if raw is None else torch.tensor(raw, dtype=torch.float64, device="cpu")


def _quantile_integral(x: torch.Tensor, a: float, b: float) -> torch.Tensor:
    n = x.shape[-1]
    edge = torch.arange(n + 1, dtype=torch.float64, device="cpu") / n  # MPS has no float64
    length = (edge[1:].clamp(max=b) - edge[:-1].clamp(min=a)).clamp(min=0)
    return (x.sort(-1).values * length.to(x)).sum(-1)


def _centred(r: torch.Tensor) -> torch.Tensor:
    d = r - r[..., :1]  # so that equal scores give exactly 0
    return d - d.mean(-1, keepdim=True)


def _mean_where(x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    count = chosen.sum(-1)
    inside = torch.where(chosen, x, torch.zeros_like(x)).sum(-1) / count.clamp(min=1)
    return torch.where(count > 0, inside, x.mean(-1))


def _brief(x: int | torch.Tensor) -> str:
    return describe(x) if isinstance(x, torch.Tensor) else str(x)

"""Errors at the door of the risk objective, and its inputs brought to one form."""

from __future__ import annotations

import math

import torch

from riskpo_kernels.core.checks import check_choice, check_positive, check_shape, describe, reject

FORMS = ("paper", "official", "seeking", "mean")
# The official form divides by alpha: below this the tail's slope is a blow-up, not a preference.
SMALLEST_OFFICIAL_ALPHA = 1e-3


def check_risk(
    op: str,
    *,
    form: str,
    alpha: float,
    beta: float,
    omega: float = 0.0,
    w_mix: float = 0.0,
    eps: float = 0.0,
) -> None:
    """The settings of a risk objective make sense together."""
    check_choice(op, "form", form, FORMS)
    check_range(op, "alpha", alpha, "beta", beta)
    for name, value in (("omega", omega), ("w_mix", w_mix), ("eps", eps)):
        check_positive(op, name, value, zero_ok=True)
    if alpha == 0:
        reject(op, "alpha=0", "0 < alpha < beta", "Without a tail use form='mean' or omega=0.")
    if form == "official" and alpha < SMALLEST_OFFICIAL_ALPHA:
        todo = "This form divides by alpha; use form='paper'."
        reject(op, f"alpha={alpha}", f"alpha >= {SMALLEST_OFFICIAL_ALPHA}", todo)
    if form == "seeking" and beta == 1:
        reject(op, "beta=1", "beta < 1", "form='seeking' divides by 1 - beta.")


def check_range(op: str, low_name: str, low: float, high_name: str, high: float) -> None:
    """Two levels, probabilities in rising order."""
    for x in (low, high):
        if not isinstance(x, (int, float)) or isinstance(x, bool):
            reject(op, describe(x), f"numbers {low_name} and {high_name}", "Pass Python floats.")
    if not 0 <= low < high <= 1:  # also false for NaN
        came, expected = f"{low_name}={low}, {high_name}={high}", f"0 <= {low_name} < {high_name}"
        reject(op, came, f"{expected} <= 1", "Levels are probabilities, lowest first.")


def widened(op: str, name: str, x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or as it is in float64; refuses what is empty or not a real tensor."""
    if not isinstance(x, torch.Tensor) or x.is_complex():
        reject(op, f"{name} = {describe(x)}", "a tensor of real numbers", f"Convert {name} first.")
    if x.ndim == 0 or x.numel() == 0:
        reject(op, f"{name} = {describe(x)}", "at least one score", "Skip empty batches.")
    return x if x.dtype == torch.float64 else x.float()


def finite(op: str, scores: torch.Tensor) -> torch.Tensor:
    """`scores` widened; refuses NaN and infinity, which sorting would hide."""
    x = widened(op, "scores", scores)
    if not bool(torch.isfinite(x).all()):
        came = f"scores = {describe(scores)} with NaN or infinity"
        reject(op, came, "finite scores", "Find the reward that is not a number.")
    return x


def as_quantile(op: str, name: str, q: float | torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """`q` as a tensor that broadcasts against the scores `r` in the way that was meant."""
    if not isinstance(q, torch.Tensor):
        if not isinstance(q, (int, float)) or math.isnan(q):
            reject(op, f"{name}={q!r}", "a number or a tensor", "Pass the quantile's value.")
        return torch.full((), float(q), dtype=r.dtype, device=r.device)
    if q.numel() == 1:
        return q.detach().reshape(()).to(r)
    # A bare [K] beside [K, G] would broadcast along the papers without a word when K == G.
    fits = q.ndim == r.ndim and all(s in (1, t) for s, t in zip(q.shape, r.shape, strict=True))
    if not fits:
        expected = f"one element, or sizes that broadcast to {list(r.shape)} dimension by dimension"
        reject(op, f"{name} of shape {list(q.shape)}", expected, f"Use {name}[:, None] per bundle.")
    return q.detach().to(r)


def as_permutation(op: str, permutation: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """`permutation` as int64 beside `r`; refuses a row that is none."""
    integral = isinstance(permutation, torch.Tensor) and permutation.dtype in (
        torch.int32,
        torch.int64,
    )
    if not integral:
        came = f"permutation = {describe(permutation)}"
        reject(op, came, "int64 [Q, G]", "Stack torch.randperm(G) per question.")
    check_shape(op, "permutation", permutation, tuple(r.shape), "the shape of rewards")
    index = permutation.to(device=r.device, dtype=torch.int64)
    if not bool((index.sort(1).values == torch.arange(r.shape[1], device=r.device)).all()):
        came = "a row of permutation that repeats or leaves out a response"
        reject(op, came, f"each of 0..{r.shape[1] - 1} once per row", "Use torch.randperm(G).")
    return index

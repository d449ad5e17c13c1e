"""The scalar mathematics of the clipped surrogate, written once for PyTorch and for Triton.

Every function is elementwise and pure, and speaks the two words of Triton's dialect that PyTorch
also has, through the name `tl`. Here `tl` is PyTorch; riskpo_kernels.kernels.surrogate compiles
the same code objects with triton.language in its place. Value and derivative stand side by side.

x        log-ratio, log pi_new - log pi_old, of a token or the mean over a sequence's tokens
r        ratio, exp(x)
a        advantage (times the correction weight)
f(r, a)  the loss to minimise: -min(r a, clip(r, lower, upper) a), at most -dual a where a < 0
u        log pi_ref - log pi_new

Clamps are comparisons, not minimum / maximum: those drop NaN in Triton and keep it in PyTorch,
and a NaN log-prob must be seen in the loss.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

tl = SimpleNamespace(exp=torch.exp, where=torch.where)

TOKEN_BOUND = 20.0  # |x| of one token, and |u|
SEQUENCE_BOUND = 10.0  # |x| of a sequence's mean
DUAL_OFF = 1e30  # a dual clip that no ratio reaches


def bounded(x: torch.Tensor, bound: float) -> torch.Tensor:
    """x clamped to +-bound; NaN stays NaN."""
    x = tl.where(x < -bound, -bound, x)
    return tl.where(x > bound, bound, x)


def saturated(x: torch.Tensor, bound: float) -> torch.Tensor:
    """Where `bounded` has slope 0."""
    return (x < -bound) | (x > bound)


def surrogate(
    r: torch.Tensor, a: torch.Tensor, lower: float, upper: float, dual: float
) -> torch.Tensor:
    """f(r, a); 0 where a = 0, whatever r is: what has no weight is not read."""
    held = tl.where(r < lower, lower, r)
    held = tl.where(held > upper, upper, held)
    free_loss, held_loss = -a * r, -a * held
    loss = tl.where(free_loss < held_loss, held_loss, free_loss)
    loss = tl.where((a < 0.0) & (loss > -a * dual), -a * dual, loss)
    return tl.where(a == 0.0, 0.0, loss)


def cuts(
    r: torch.Tensor, a: torch.Tensor, lower: float, upper: float, dual: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the lower, the upper and the dual clip of f are active, that is df/dr = 0."""
    return (a < 0.0) & (r < lower), (a > 0.0) & (r > upper), (a < 0.0) & (r > dual)


def surrogate_slope(r: torch.Tensor, a: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """df/dx = r df/dr."""
    return tl.where(cut | (a == 0.0), 0.0, -a * r)


def kl_k1(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Schulman's k1 = -u, and dk1/dlogprob = 1."""
    one = tl.where(u == u, 1.0, u)  # NaN stays one, in the slope too
    return -u * one, one


def kl_k2(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Schulman's k2 = u^2 / 2, and dk2/dlogprob = -u."""
    return 0.5 * u * u, -u


def kl_k3(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Schulman's k3 = exp(u) - 1 - u, and dk3/dlogprob = 1 - exp(u).

    Both cancel where policies are alike: 0 of k3's digits are left at u = 1e-4 in float32. Inside
    |u| < 1 it is u^2 / 2 (1 + u / 3 (1 + u / 4 (...))), to the last digit of float64.
    """
    tail = 1.0 + (1.0 / 17.0) * u * (1.0 + (1.0 / 18.0) * u)
    tail = 1.0 + (1.0 / 15.0) * u * (1.0 + (1.0 / 16.0) * u * tail)
    tail = 1.0 + (1.0 / 13.0) * u * (1.0 + (1.0 / 14.0) * u * tail)
    tail = 1.0 + (1.0 / 11.0) * u * (1.0 + (1.0 / 12.0) * u * tail)
    tail = 1.0 + (1.0 / 9.0) * u * (1.0 + (1.0 / 10.0) * u * tail)
    tail = 1.0 + (1.0 / 7.0) * u * (1.0 + (1.0 / 8.0) * u * tail)
    tail = 1.0 + (1.0 / 5.0) * u * (1.0 + (1.0 / 6.0) * u * tail)
    tail = 1.0 + (1.0 / 3.0) * u * (1.0 + (1.0 / 4.0) * u * tail)
    series = 0.5 * u * u * tail
    near, e = (u > -1.0) & (u < 1.0), tl.exp(u)
    return tl.where(near, series, e - 1.0 - u), tl.where(near, -u - series, 1.0 - e)

"""Inputs, gradients and verdicts that the traps share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from riskpo.doctor.libraries import Found, LogProb, Op, plain_op
from riskpo.doctor.problem import fresh, peaked
from riskpo.doctor.term_sizes import head_sizes
from riskpo.doctor.tolerance import bounds


@dataclass(frozen=True)
class Seen:
    """holds: None where the function does not offer it or raised; detail: the numbers or why."""

    holds: bool | None
    detail: str = ""

    def __str__(self) -> str:
        """A cell of the matrix: numbers as they are, an identity as yes or no, failures in bold."""
        text = self.detail or ("yes" if self.holds else "no")
        return f"**{text}**" if self.holds is False else text


def bounded(error: float, limit: float, unit: str = "") -> Seen:
    """`error <= limit`, written out; NaN does not hold."""
    holds = error <= limit
    return Seen(holds, f"{error:.1e} {'≤' if holds else '>'} {limit:.1e}{unit}")


def rows(
    n: int, d: int, v: int, dtype: torch.dtype = torch.float32, lean: float = 8.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [n, d], weight [v, d], target [n]; half of the rows peaked at the target."""
    hidden, weight, target = peaked(torch.Generator().manual_seed(seed), (n,), d, v, lean)
    return hidden.to(dtype), weight.to(dtype), target


def coefficients(n: int, seed: int = 1) -> torch.Tensor:
    """[n] float32 upstream gradients of both signs."""
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


NAMES = ("logprob", "entropy", "dhidden", "dweight")


def gradients(
    call: LogProb,
    h: torch.Tensor,
    w: torch.Tensor,
    t: torch.Tensor,
    c: torch.Tensor | None,
    e: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(logprob, entropy, dhidden, dweight) of sum(c * logprob) + sum(e * entropy)."""
    h, w = fresh(h), fresh(w)
    logprob, entropy = call(h, w, t, temperature)
    terms = [(c, logprob), (e, entropy)]
    total = sum((x * k.to(x.dtype)).sum() for k, x in terms if k is not None and x is not None)
    assert isinstance(total, torch.Tensor)
    dh, dw = torch.autograd.grad(total, (h, w))
    return logprob.detach(), None if entropy is None else entropy.detach(), dh, dw


def exact_plain(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, temperature: float) -> Found:
    """Plain PyTorch with float32 logits: the honest error of a dtype."""
    wide = torch.promote_types(h.dtype, torch.float32)
    return plain_op(h.to(wide), w.to(wide), t, temperature)


def against_plain(
    op: Op,
    h: torch.Tensor,
    w: torch.Tensor,
    t: torch.Tensor,
    c: torch.Tensor | None,
    e: torch.Tensor | None = None,
    temperature: float = 1.0,
    only: tuple[str, ...] = (),
) -> Seen:
    """Log-prob, entropy and gradients of one input against float64; the worst one is reported."""
    truth = gradients(exact_plain, h.double(), w.double(), t, c, e, temperature)
    honest = gradients(exact_plain, h, w, t, c, e, temperature)
    got = gradients(op.call, h, w, t, c, e, temperature)
    up = {k: x.reshape(-1) for k, x in (("logprob", c), ("entropy", e)) if x is not None}
    flat = h.reshape(-1, h.shape[-1])
    sizes = head_sizes(flat, w, t.reshape(-1), temperature=temperature, upstream=up)
    seen, worst = Seen(None), -1.0
    for name, g, x, p in zip(NAMES, got, truth, honest, strict=True):
        if g is None or x is None or p is None or name == "entropy" and e is None:
            continue
        if only and name not in only:
            continue
        for metric, error, limit in bounds(g, x, p, size=sizes[name].reshape(x.shape)):
            share = math.inf if math.isnan(error) else error / (limit or 1e-300)
            if share > worst:
                unit = f" {name}" if metric == "relative norm" else f" {name}, {metric}"
                worst, seen = share, bounded(error, limit, unit)
    return seen

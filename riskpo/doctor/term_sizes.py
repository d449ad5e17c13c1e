"""The size of what is summed in a head's results, for the rule of tolerance.

float32 rounds every product in a logit and the logit itself, so a logit of size 30 is off by about
1e-6. One plain run may be more exact by luck, and with few rows or near-certain tokens nothing
averages the luck out. The size of a result is therefore its own magnitude plus, to first order, the
effect of all logits' sizes: the sum over v of |d result / d z_v| (|h| . |w_v| + |b_v|).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# In floors of the rule, which are two units in the last place of float32:
UNIT = 2.0**-2  # the rounding of a term, half a unit
TRUTH = 2.0**-30  # the error of float64's own truth


class Rows(NamedTuple):
    """Parts of the rows' softmax and their sizes, float64 [N, V] unless said otherwise."""

    logp: torch.Tensor
    hit: torch.Tensor  # 1 at the target
    entropy: torch.Tensor  # [N, 1]
    spread: torch.Tensor  # -d entropy / d z
    off: torch.Tensor  # size of a logit before the softcap: the sum of its products' magnitudes
    z_off: torch.Tensor  # size of a logit z
    bend: torch.Tensor  # tanh of the softcap, 0 without one
    slope: torch.Tensor  # derivative of the softcap
    wide: torch.Tensor  # [N, 1]: error of the truth, in floors


def head_sizes(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    upstream: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Sizes by name, float64: logprob, entropy, lse [N] and, with `upstream`, dhidden, dweight and
    dbias in the shapes of hidden [N, D], weight [V, D] and bias [V].

    target: [N] valid ids. upstream: gradients [N] of logprob, entropy and lse, and as "curvature"
    how much the gradient of logprob changes with the logprob; a missing name is 0.
    """
    h, w, b = (None if x is None else x.detach().double().cpu() for x in (hidden, weight, bias))
    assert h is not None and w is not None
    b = torch.zeros(len(w), dtype=h.dtype) if b is None else b
    raw, off = (h @ w.T + b) / temperature, (h.abs() @ w.abs().T + b.abs()) / temperature
    bend = torch.tanh(raw / softcap) if softcap else torch.zeros_like(raw)
    z = bend * softcap if softcap else raw
    logp = torch.log_softmax(z, -1)
    hit = torch.nn.functional.one_hot(target.cpu(), len(w)).double()
    p, slope = logp.exp(), 1 - bend**2
    entropy, z_off = -(p * logp).sum(-1, keepdim=True), slope * off + z.abs()
    spread, wide = p * (logp + entropy), TRUTH * (1 + z.abs().amax(-1, keepdim=True))
    rows = Rows(logp, hit, entropy, spread, off, z_off, bend, slope, wide)
    exact = torch.where(hit > 0, logp, 0.0).sum(-1)
    # float32 holds a probability near 1 to one unit; that of the target the op keeps better
    unit = (p * (1 - hit)).sum(-1)
    sizes = {
        "logprob": exact.abs() + UNIT * ((hit - p).abs() * z_off).sum(-1),
        "entropy": entropy[:, 0] + UNIT * ((spread.abs() * z_off).sum(-1) + unit),
        "lse": z.logsumexp(-1).abs() + UNIT * (p * z_off).sum(-1),
    }
    sizes = {name: size + wide[:, 0] for name, size in sizes.items()}
    if upstream is None:
        return sizes
    none = torch.zeros(len(h), dtype=h.dtype)
    c, g, e, curvature = (
        upstream.get(name, none).detach().double().cpu()[:, None]
        for name in ("logprob", "entropy", "lse", "curvature")
    )
    moved = curvature.abs() * sizes["logprob"][:, None]
    dz, dz_off = (x / temperature for x in _gradient(rows, c, g, e, moved, softcap))
    return sizes | {
        "dhidden": (dz @ w).abs() + dz_off @ w.abs(),
        "dweight": (dz.T @ h).abs() + dz_off.T @ h.abs(),
        "dbias": dz.sum(0).abs() + dz_off.sum(0),
    }


def _gradient(
    rows: Rows,
    c: torch.Tensor,
    g: torch.Tensor,
    e: torch.Tensor,
    moved: torch.Tensor,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the logits and the size of what it may be off by; moved: that of c."""
    p, hit, z_off, spread = rows.logp.exp(), rows.hit, rows.z_off, rows.spread
    dz = c * (hit - p) - g * spread + e * p
    others = ((p * z_off).sum(-1, keepdim=True) - p * z_off).clamp(min=0)
    p_off = p * ((1 - p) * z_off + others)
    bent = 1 + (rows.logp + rows.entropy).abs()
    off = dz.abs() + (c.abs() + e.abs()) * p_off
    off += g.abs() * (p_off * bent + p * (spread.abs() * z_off).sum(-1, keepdim=True))
    off = UNIT * off + moved * (hit - p).abs() + (c.abs() + g.abs() + e.abs()) * rows.wide
    if softcap:  # the slope is off by a rounding of 1 and by what moves the bend
        far = 1 + 2 * rows.bend.abs() * rows.slope * rows.off / softcap
        off = off * rows.slope + UNIT * dz.abs() * far
    return dz * rows.slope, off

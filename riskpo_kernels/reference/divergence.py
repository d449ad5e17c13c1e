"""linear_divergence and topk_divergence, as the papers write them; every logit is materialised.

p = softmax(student's z), q = softmax(teacher's z), at one temperature

forward_kl   KL(q || p) = sum q (log q - log p)             Hinton et al., arXiv 1503.02531
reverse_kl   KL(p || q) = sum p (log p - log q)             MiniLLM, arXiv 2306.08543
jsd          beta KL(q || m) + (1 - beta) KL(p || m)        GKD, arXiv 2306.13649
             m = beta q + (1 - beta) p
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from riskpo_kernels.reference.ranks import whole


def linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    teacher_bias: torch.Tensor | None = None,
    teacher_scale: float = 1.0,
    teacher_softcap: float | None = None,
    tail_eps: float | None = None,
    vocab_group: Any = None,
    memory_mib: float = 300,
    backend: str = "reference",
) -> torch.Tensor:
    """[...] divergences, 0 where mask is False; computes in at least float32. tail_eps, memory_mib
    and backend have nothing to act on here."""
    live = _live(hidden, mask)
    t = temperature[live][:, None] if isinstance(temperature, torch.Tensor) else temperature
    sides = []
    for h, w, b, factor, cap in (
        (hidden, weight, bias, scale, softcap),
        (teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap),
    ):
        z = _logits(h[live], w, b, factor, cap, vocab_group)
        sides.append(
            torch.log_softmax(z / (t.to(z.dtype) if isinstance(t, torch.Tensor) else t), -1)
        )
    wide = torch.promote_types(sides[0].dtype, sides[1].dtype)
    return _spread(
        live, divergence_of(sides[0].to(wide), sides[1].to(wide), kind, beta).to(sides[0])
    )


def topk_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    teacher_logprob: torch.Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    tail_eps: float | None = None,
    vocab_group: Any = None,
    memory_mib: float = 300,
    deterministic: bool = False,
    backend: str = "reference",
) -> torch.Tensor:
    """[...] divergences over the teacher's K ids and one bucket for all others."""
    live = _live(hidden, mask)
    t = temperature[live][:, None] if isinstance(temperature, torch.Tensor) else temperature
    z = _logits(hidden[live], weight, bias, scale, softcap, vocab_group)
    log_p = torch.log_softmax(z / t, -1)
    ids = token_ids[live].long()
    rest = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, ids, False)
    tail = log_p.masked_fill(~rest, -torch.inf).logsumexp(-1, keepdim=True)
    mine = torch.cat([log_p.gather(-1, ids), tail.clamp(min=TAIL_FLOOR)], -1)
    return _spread(live, divergence_of(mine, _with_tail(teacher_logprob[live].to(z)), kind, beta))


TAIL_FLOOR = -24 * math.log(2)  # of a bucket's log-prob: float32's rounding of a sum to 1


def _with_tail(logprob: torch.Tensor) -> torch.Tensor:
    """[..., K] log-probs and the log of what they leave of 1, [..., K + 1]."""
    left = 1 - logprob.exp().sum(-1, keepdim=True)
    return torch.cat([logprob, left.clamp(min=2.0**-24).log()], -1)


def divergence_of(log_p: torch.Tensor, log_q: torch.Tensor, kind: str, beta: float) -> torch.Tensor:
    if kind == "forward_kl":
        return _kl(log_q, log_p)
    if kind == "reverse_kl":
        return _kl(log_p, log_q)
    shares = torch.stack([log_q + math.log(beta), log_p + math.log(1 - beta)])
    nowhere = shares.isneginf().all(0)
    log_m = shares.masked_fill(nowhere, 0.0).logsumexp(0)
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """KL(a || b), 0 log 0 = 0; PyTorch's kl_div takes b first."""
    there = ~log_a.isneginf()
    log_a, log_b = (x.where(there, 0.0) for x in (log_a, log_b))
    each = F.kl_div(log_b, log_a, reduction="none", log_target=True)
    return each.where(there, 0.0).sum(-1)


def _live(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return torch.ones(hidden.shape[:-1], dtype=torch.bool, device=hidden.device)
    return mask.bool()


def _logits(
    h: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    scale: float,
    cap: float | None,
    group: Any,
) -> torch.Tensor:
    wide = torch.promote_types(h.dtype, torch.float32)
    if group is not None:
        w, b = whole(w, group), None if b is None else whole(b, group)
    z = h.to(wide) @ w.to(wide).T
    z = (z if b is None else z + b.to(wide)) * scale
    return z if cap is None else cap * torch.tanh(z / cap)


def _spread(live: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(live.shape, dtype=x.dtype, device=x.device).masked_scatter(live, x)

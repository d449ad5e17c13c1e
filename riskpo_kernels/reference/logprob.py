"""linear_logprob and logits_logprob, as the textbook writes them; every logit is materialised.

z = softcap(scale * (h W^T + b)) / T          softcap(x) = c tanh(x / c)
logprob = z[target] - logsumexp(z)            entropy = - sum_v p_v log p_v,  p = softmax(z)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from riskpo_kernels.reference.ranks import whole


class TokenLogProbs(NamedTuple):
    """Per-token results in nats; entropy is None unless asked for. All are
    differentiable: with h w_k - lse, any other token's log-prob is too."""

    logprob: torch.Tensor
    entropy: torch.Tensor | None
    lse: torch.Tensor


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    ignore_index: int | None = -100,
    tail_eps: float | None = None,
    vocab_group: Any = None,
    memory_mib: float = 300,
    deterministic: bool = False,
    backend: str = "reference",
) -> TokenLogProbs:
    """Hidden states [..., D], head [V, D] and targets [...] to log-probs [...]; computes in at
    least float32. tail_eps, memory_mib, deterministic and backend have nothing to act on here."""
    if vocab_group is not None:
        weight = whole(weight, vocab_group)
        bias = None if bias is None else whole(bias, vocab_group)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    kept = _kept(target, ignore_index)
    rows = hidden[kept].to(wide)  # a dropped row's NaN must not reach a product
    logits = rows @ weight.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    per_row = temperature[kept] if isinstance(temperature, torch.Tensor) else temperature
    logits = logits * scale
    return _log_probs(logits, kept, target, per_row, softcap, return_entropy)


def logits_logprob(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    ignore_index: int | None = -100,
    inplace_backward: bool = False,
    backend: str = "reference",
) -> TokenLogProbs:
    """Logits [..., V] and targets [...] to log-probs [...]; never writes into logits."""
    kept = _kept(target, ignore_index)
    rows = logits[kept].to(torch.promote_types(logits.dtype, torch.float32))
    per_row = temperature[kept] if isinstance(temperature, torch.Tensor) else temperature
    return _log_probs(rows, kept, target, per_row, softcap, return_entropy)


def _kept(target: torch.Tensor, ignore_index: int | None) -> torch.Tensor:
    everything = torch.ones_like(target, dtype=torch.bool)
    return everything if ignore_index is None else target != ignore_index


def _log_probs(
    z: torch.Tensor,
    kept: torch.Tensor,
    target: torch.Tensor,
    temperature: float | torch.Tensor,
    softcap: float | None,
    return_entropy: bool,
) -> TokenLogProbs:
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(z.dtype)[:, None]
    z = z / temperature
    log_p = torch.log_softmax(z, dim=-1)
    taken = log_p.gather(-1, target[kept].long()[:, None])[:, 0]
    lse = torch.logsumexp(z, dim=-1)

    def spread(x: torch.Tensor) -> torch.Tensor:  # back to the callers' rows, zero where ignored
        return torch.zeros(kept.shape, dtype=x.dtype, device=x.device).masked_scatter(kept, x)

    entropy = None
    if return_entropy:
        p = log_p.exp()
        entropy = spread(-(p * log_p.masked_fill(p == 0, 0.0)).sum(-1))  # 0 log 0 = 0
    return TokenLogProbs(spread(taken), entropy, spread(lse))

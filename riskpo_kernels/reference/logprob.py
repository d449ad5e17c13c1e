"""linear_logprob and logits_logprob, as the textbook writes them; every logit is materialised.

z = softcap(scale * (h W^T + b)) / T          softcap(x) = c tanh(x / c)
logprob = z[target] - logsumexp(z)            entropy = - sum_v p_v log p_v,  p = softmax(z)

With a support z is -inf outside of the row's kept ids. With K targets a row they share the softmax.
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
    support: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    outside_support: str = "raise",
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    tail_eps: float | None = None,
    vocab_group: Any = None,
    memory_mib: float = 300,
    deterministic: bool = False,
    backend: str = "reference",
) -> TokenLogProbs:
    """Hidden states [..., D], head [V, D] and targets [...] to log-probs [...]; computes in at
    least float32. tail_eps, memory_mib, deterministic and backend have nothing to act on here.
    target [..., K] gives logprob [..., K]; support keeps the ids of a row, outside_support is
    taken as "-inf"."""
    if lora is not None:  # z of the merged head: W + factor B A
        a, b, factor = lora
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weight = weight.to(wide) + factor * b.to(wide) @ a.to(wide)
    if vocab_group is not None:
        weight = whole(weight, vocab_group)
        bias = None if bias is None else whole(bias, vocab_group)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    kept = _kept(target, ignore_index)
    if target.dim() == hidden.dim():  # a row counts where one of its K targets does
        kept = kept.any(-1)
    rows = hidden[kept].to(wide)  # a dropped row's NaN must not reach a product
    logits = rows @ weight.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    per_row = temperature[kept] if isinstance(temperature, torch.Tensor) else temperature
    logits = logits * scale
    inside = None if support is None else _inside(support, kept, logits.shape[-1])
    return _log_probs(logits, kept, target, per_row, softcap, return_entropy, inside, ignore_index)


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


def _inside(
    support: torch.Tensor | tuple[torch.Tensor, torch.Tensor], kept: torch.Tensor, vocab: int
) -> torch.Tensor:
    """[live rows, V] bool, which ids the rows keep: of [..., K] ids, -1 where there is none, or of
    all rows' ids in turn and offsets [N + 1]."""
    inside = torch.zeros(kept.numel(), vocab + 1, dtype=torch.bool, device=kept.device)
    if isinstance(support, torch.Tensor):
        ids = support.flatten(0, -2).long()
        inside.scatter_(1, ids.masked_fill(ids < 0, vocab), True)
    else:
        ids, offsets = (x.long() for x in support)
        row = torch.arange(kept.numel(), device=kept.device).repeat_interleave(offsets.diff())
        inside[row, ids] = True
    return inside[kept.flatten(), :vocab]


def _log_probs(
    z: torch.Tensor,
    kept: torch.Tensor,
    target: torch.Tensor,
    temperature: float | torch.Tensor,
    softcap: float | None,
    return_entropy: bool,
    inside: torch.Tensor | None = None,
    ignore_index: int | None = None,
) -> TokenLogProbs:
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(z.dtype)[:, None]
    z = z / temperature
    if inside is not None:
        z = z.masked_fill(~inside, -torch.inf)
    log_p = torch.log_softmax(z, dim=-1)
    ids = target[kept].long()
    ids = ids if target.dim() > kept.dim() else ids[:, None]
    live = _kept(ids, ignore_index)
    taken = log_p.gather(-1, ids.masked_fill(~live, 0)).masked_fill(~live, 0.0)
    if inside is not None:  # a constant
        taken = torch.where(taken == -torch.inf, -torch.inf, taken)
    lse = torch.logsumexp(z, dim=-1)

    def spread(x: torch.Tensor) -> torch.Tensor:  # back to the callers' rows, zero where ignored
        return torch.zeros(kept.shape, dtype=x.dtype, device=x.device).masked_scatter(kept, x)

    entropy = None
    if return_entropy:
        p = log_p.exp()
        entropy = spread(-(p * log_p.masked_fill(p == 0, 0.0)).sum(-1))  # 0 log 0 = 0
    if target.dim() == kept.dim():
        return TokenLogProbs(spread(taken[:, 0]), entropy, spread(lse))
    all_taken = torch.stack([spread(x) for x in taken.unbind(1)], -1)
    return TokenLogProbs(all_taken, entropy, spread(lse))

"""riskpo_loss beside the same loss over materialised logits: hidden states to gradients."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import peers, regimes
from benchmarks.bench_linear_logprob import default_tail_eps
from benchmarks.provider import Provider, auto_backend, device_of, too_large
from benchmarks.truth import gradients_in, relative_error
from riskpo_kernels import linear_logprob, reference, riskpo_loss, riskpo_loss_from_logits

SEQUENCES = regimes.SEQUENCES
TAIL = 2.0**-14
CLIP = (3e-4, 4e-4)  # riskpo_loss's own for a ratio of sequences
CASES: dict[str, dict[str, Any]] = {
    "small": {
        "n": 256,
        "d": 256,
        "v": 4096,
        "dtype": "float32",
        "regime": "rl",
        "zero_fraction": 0.5,
    }
}


def inputs(
    n: int,
    d: int,
    v: int,
    dtype: str,
    regime: str,
    zero_fraction: float,
    device: str = "cpu",
    rows: str | None = None,
) -> dict[str, Any]:
    """Packed sequences of n / 16 tokens, near-on-policy old log-probs, one advantage each."""
    where = torch.device(device)
    made = regimes.make(n, d, v, regime, dtype=getattr(torch, dtype), device=where, rows=rows)
    cu_seqlens = torch.arange(SEQUENCES + 1, dtype=torch.int32, device=where) * (n // SEQUENCES)
    with torch.no_grad():
        old = linear_logprob(made.hidden, made.weight, made.target).logprob
        old = old + 1e-4 * torch.randn(old.shape, device=where)  # inside the clip range
    return {
        "hidden": made.hidden.requires_grad_(),
        "weight": made.weight.requires_grad_(),
        "target": made.target,
        "old_logprob": old,
        "advantage": regimes.coefficients(n, zero_fraction, where)[cu_seqlens[:-1].long()],
        "cu_seqlens": cu_seqlens,
        "_facts": {
            "entropy_nats": made.entropy_nats,
            "active_share": made.active_share,
            "rows": made.source,
        },
    }


def providers() -> dict[str, Provider]:
    """All of them compute the same loss: clipped ratios of sequences, the mean over sequences of
    token means. Liger's Triton kernels take logits."""
    ours: dict[str, Any] = {"kind": "ours", "logits_in": "float32", "sums_in": "float32"}
    dense = {"logits_in": "inputs", "sums_in": peers.ONCE}
    backend = auto_backend("linear_logprob")
    return {
        "riskpo_loss": Provider(_fused, **ours, backend=backend),
        "riskpo_loss, tail_eps=2^-14": Provider(
            _tail,
            **ours,
            why_not=_default_tail,
            backend=backend,
        ),
        "logits + riskpo_loss_from_logits": Provider(
            _from_logits,
            **ours | dense,
            why_not=_fits,
            backend=auto_backend("logits_logprob"),
            units=lambda sizes, facts: 6,
        ),
        "plain": Provider(
            _plain, kind="plain", why_not=_fits, units=lambda sizes, facts: 6, **dense
        ),
        "Liger chunked": Provider(
            _liger,
            why_not=_no_liger,
            units=lambda sizes, facts: 8,
            logits_in="inputs",
            sums_in="inputs",
        ),
        "Liger Triton": Provider(
            _liger_triton,
            why_not=_no_liger_triton,
            backend=lambda given: "triton",
            units=lambda sizes, facts: 6,
            **dense,
        ),
    }


def cost(n: int, d: int, v: int, dtype: str, regime: str, zero_fraction: float) -> dict[str, float]:
    """As linear_logprob's; the surrogate adds a few bytes per token."""
    size = getattr(torch, dtype).itemsize
    return {"bytes": float(2 * size * (n * d + v * d) + 40 * n), "flops": 6.0 * n * d * v}


def truths(given: dict[str, Any]) -> dict[str, Any]:
    """A few sequences (at most 1024 tokens, or 4096 of one) in float64; those with an advantage
    first, for the others have no gradient."""
    length = given["target"].numel() // SEQUENCES
    count = max(1, min(SEQUENCES, 1024 // max(length, 1)))
    kept = given["advantage"].abs().argsort(descending=True, stable=True)[:count]
    size = min(length, 4096)

    def tokens(x: torch.Tensor) -> torch.Tensor:
        return x.detach().unflatten(0, (SEQUENCES, length))[kept, :size].flatten(0, 1)

    part = {k: tokens(given[k]) for k in ("hidden", "target", "old_logprob")}
    part |= {"weight": given["weight"].detach(), "advantage": given["advantage"][kept]}
    part["cu_seqlens"] = given["cu_seqlens"].new_tensor([size * i for i in range(count + 1)])
    h, w = (part[k].double().requires_grad_() for k in ("hidden", "weight"))
    loss = reference.riskpo_loss(
        h,
        w,
        part["target"],
        part["old_logprob"].double(),
        part["advantage"].double(),
        cu_seqlens=part["cu_seqlens"],
    ).loss
    loss.backward()
    over = f"{count} of {SEQUENCES} sequences, {size} tokens each"
    over = "everything" if count * size == given["target"].numel() else over
    return {"over": over, "part": part, "loss": loss.detach(), "dh": h.grad, "dw": w.grad}


def errors(provider: Provider, given: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """Loss error (absolute) and gradient error."""
    part = dict(exact["part"])
    part["hidden"] = h = part["hidden"].clone().requires_grad_()
    part["weight"] = w = part["weight"].clone().requires_grad_()
    loss = provider.run(**part)
    found: dict[str, Any] = {
        "loss_error": (loss.detach().double() - exact["loss"]).abs().item(),
        "dh_error": relative_error(h.grad, exact["dh"]),
        "dw_error": relative_error(w.grad, exact["dw"]),
    }
    found |= {"errors_over": exact["over"], "gradients_in": gradients_in(dH=h.grad, dW=w.grad)}
    return found | {"gradient_error": max(found["dh_error"], found["dw_error"])}


def _fused(**given: Any) -> torch.Tensor:
    loss = riskpo_loss(**given).loss
    loss.backward()
    return loss


def _tail(**given: Any) -> torch.Tensor:
    loss = riskpo_loss(**given, tail_eps=TAIL).loss
    loss.backward()
    return loss


def _from_logits(hidden: torch.Tensor, weight: torch.Tensor, **given: Any) -> torch.Tensor:
    loss = riskpo_loss_from_logits(hidden @ weight.T, **given).loss
    loss.backward()
    return loss


def _plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    logprob, _ = peers.plain(hidden, weight, target, False)
    loss = reference.clipped_surrogate(logprob, old_logprob, advantage, cu_seqlens=cu_seqlens).loss
    loss.backward()
    return loss


def _default_tail(given: dict[str, Any]) -> str | None:
    same = default_tail_eps(given["hidden"].dtype) == TAIL
    return "the default for this dtype" if same else None


def _fits(given: dict[str, Any]) -> str | None:
    return too_large(given, 12.0 * given["target"].numel() * given["weight"].shape[0])


LIGER = ("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
LIGER_TRITON = ("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")
SAME_LOSS = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
SAME_LOSS |= {"temperature": 1.0, "beta": 0.0}


def _no_liger(given: dict[str, Any]) -> str | None:
    return peers.find(*LIGER)[1]


def _liger(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    op = peers.find(*LIGER)[0](
        **SAME_LOSS,
        epsilon_low=CLIP[0],
        epsilon_high=CLIP[1],
        compiled=hidden.device.type == "cuda",
        use_ref_model=False,
    )
    shape = (advantage.numel(), -1)
    ids = target.view(shape)
    loss, _ = op(
        hidden.view(*shape, hidden.shape[-1]),
        weight,
        ids,
        torch.ones_like(ids),
        advantage,
        old_per_token_logps=old_logprob.view(shape),
    )
    loss.backward()
    return loss


def _no_liger_triton(given: dict[str, Any]) -> str | None:
    if device_of(given).type != "cuda":
        return "needs a CUDA device"
    return peers.find(*LIGER_TRITON)[1] or _fits(given)


def _liger_triton(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    shape = (advantage.numel(), -1)
    # it leaves the last position of every sequence out: [S, L + 1, V] logits
    rows = torch.nn.functional.pad(hidden.view(*shape, hidden.shape[-1]), (0, 0, 0, 1))
    ids = target.view(shape)
    loss, _ = peers.find(*LIGER_TRITON)[0](
        rows @ weight.T,
        old_logprob.view(shape),
        None,
        ids,
        advantage,
        torch.ones_like(ids),
        eps_low=CLIP[0],
        eps_high=CLIP[1],
        reduce=True,
        **SAME_LOSS,
    )
    loss.backward()
    return loss

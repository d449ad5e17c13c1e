"""linear_divergence beside the divergence of two [N, V] log-softmaxes, forward + backward."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import regimes
from benchmarks.provider import Provider, too_large
from riskpo_kernels import linear_divergence
from riskpo_kernels.reference.divergence import divergence_of

CASES: dict[str, dict[str, Any]] = {
    "small": {
        "n": 256,
        "d": 256,
        "v": 4096,
        "dtype": "float32",
        "regime": "rl",
        "kind": "reverse_kl",
    },
    **{
        f"D576 V49k, {kind}": {
            "n": 512,
            "d": 576,
            "v": 49_152,
            "dtype": "float32",
            "regime": "rl",
            "kind": kind,
        }
        for kind in ("reverse_kl", "forward_kl")
    },
}
TEMPERATURE = 0.6


def inputs(
    n: int, d: int, v: int, dtype: str, regime: str, kind: str, device: str = "cpu"
) -> dict[str, Any]:
    """The student's hidden [N, D] and weight [V, D]; the teacher is the same head, a noise of a
    tenth on its hidden states."""
    where = torch.device(device)
    made = regimes.make(n, d, v, regime, dtype=getattr(torch, dtype), device=where)
    g = torch.Generator(device=where).manual_seed(1)
    noise = torch.randn(made.hidden.shape, generator=g, device=where) * made.hidden.float().std()
    return {
        "hidden": made.hidden.requires_grad_(),
        "weight": made.weight.requires_grad_(),
        "teacher_hidden": made.hidden.detach() + 0.1 * noise.to(made.hidden.dtype),
        "teacher_weight": made.weight.detach(),
        "kind": kind,
        "_facts": {"entropy_nats": made.entropy_nats, "active_share": made.active_share},
    }


def providers() -> dict[str, Provider]:
    """Ours, exact and with dropped blocks, and plain PyTorch."""
    return {
        "riskpo_kernels": Provider(_ours(), kind="ours", logits_in="float32", sums_in="float32"),
        "riskpo_kernels, tail_eps=2^-14": Provider(
            _ours(tail_eps=2.0**-14), kind="ours", logits_in="float32", sums_in="float32"
        ),
        "plain": Provider(
            _plain,
            kind="plain",
            why_not=lambda x: too_large(x, 40.0 * x["hidden"].shape[0] * x["weight"].shape[0]),
            units=lambda sizes, facts: 8.0,
            logits_in="inputs",
            sums_in="one product",
        ),
    }


def cost(n: int, d: int, v: int, dtype: str, regime: str, kind: str) -> dict[str, float]:
    """Least bytes (inputs read once, gradients written once) and the flops of dense products."""
    size = getattr(torch, dtype).itemsize
    return {"bytes": float(size * (n * d + v * d) * 3 + 8 * n), "flops": n * d * v * 8.0}


def _ours(**options: Any) -> Any:
    def run(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
        kind: str,
    ) -> torch.Tensor:
        given = (hidden, weight, teacher_hidden, teacher_weight)
        out = linear_divergence(*given, kind=kind, temperature=TEMPERATURE, **options)
        out.mean().backward()
        return out

    return run


def _plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    kind: str,
) -> torch.Tensor:
    log_p = ((hidden @ weight.T).float() / TEMPERATURE).log_softmax(-1)
    log_q = ((teacher_hidden @ teacher_weight.T).float() / TEMPERATURE).log_softmax(-1)
    out = divergence_of(log_p, log_q, kind, 0.5)
    out.mean().backward()
    return out

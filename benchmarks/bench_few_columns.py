"""linear_logprob on chosen ids and with LoRA on the head, beside [N, V] logits, forward + backward.

support   the softmax over 50 kept ids of each row    plain: [N, V] logits, the others masked
targets   the log-probs of 8 ids of each row          plain: [N, V]; and ours with one target
lora      a frozen head with rank 16 beside it        plain: [N, V] of the merged head
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import regimes
from benchmarks.provider import Provider, too_large
from riskpo_kernels import linear_logprob

KEPT, TARGETS, RANK, FACTOR = 50, 8, 16, 2.0
KINDS = ("support", "targets", "lora")
HEAD = {"n": 512, "d": 576, "v": 49_152, "dtype": "float32", "regime": "rl"}
CASES: dict[str, dict[str, Any]] = {
    "small": {"n": 256, "d": 256, "v": 4096, "dtype": "float32", "regime": "rl", "what": "support"},
    **{f"D576 V49k, {what}": {**HEAD, "what": what} for what in KINDS},
}


def inputs(
    n: int, d: int, v: int, dtype: str, regime: str, what: str, device: str = "cpu"
) -> dict[str, Any]:
    """hidden [N, D], weight [V, D], the kept ids [N, 50], the target [N] first of them, and the
    adapter's A [16, D], B [V, 16]."""
    where = torch.device(device)
    made = regimes.make(n, d, v, regime, dtype=getattr(torch, dtype), device=where)
    likely = [
        (made.hidden[r] @ made.weight.T).scatter_(1, made.target[r, None], torch.inf).topk(KEPT)[1]
        for r in torch.arange(n, device=where).split(256)
    ]
    g = torch.Generator(device=where).manual_seed(1)
    a, b = (torch.randn(s, generator=g, device=where) / RANK for s in ((RANK, d), (v, RANK)))
    return {
        "hidden": made.hidden.requires_grad_(),
        "weight": made.weight.requires_grad_(what != "lora"),
        "ids": torch.cat(likely),
        "a": a.to(made.hidden.dtype).requires_grad_(),
        "b": (b / 8).to(made.hidden.dtype).requires_grad_(),
        "what": what,
        "_facts": {"entropy_nats": made.entropy_nats, "active_share": made.active_share},
    }


def providers() -> dict[str, Provider]:
    """Ours, and what people do with [N, V] logits."""
    return {
        "riskpo_kernels": Provider(_run(_ours), "ours", logits_in="float32", sums_in="float32"),
        "riskpo_kernels, one target": Provider(
            _run(lambda what, h, w, ids, a, b: linear_logprob(h, w, ids[:, 0]).logprob),
            "ours",
            why_not=lambda x: None if x["what"] == "targets" else "beside several targets only",
            logits_in="float32",
            sums_in="float32",
        ),
        "plain": Provider(
            _run(_plain),
            "plain",
            why_not=lambda x: too_large(x, 24.0 * x["hidden"].shape[0] * x["weight"].shape[0]),
            units=lambda sizes, facts: 6.0,
            logits_in="inputs",
            sums_in="one product",
        ),
    }


def cost(n: int, d: int, v: int, dtype: str, regime: str, what: str) -> dict[str, float]:
    """Least bytes (inputs read once, gradients written once) and flops of a dense method, or of
    the kept rows of the head alone."""
    size, columns = getattr(torch, dtype).itemsize, KEPT if what == "support" else v
    return {"bytes": float(size * (n * d + v * d) * 2 + 8 * n), "flops": n * d * columns * 6.0}


def _ours(what: str, h: Any, w: Any, ids: Any, a: Any, b: Any) -> torch.Tensor:
    if what == "support":
        return linear_logprob(h, w, ids[:, 0], support=ids).logprob
    if what == "targets":
        return linear_logprob(h, w, ids[:, :TARGETS]).logprob
    return linear_logprob(h, w, ids[:, 0], lora=(a, b, FACTOR)).logprob


def _plain(what: str, h: Any, w: Any, ids: Any, a: Any, b: Any) -> torch.Tensor:
    if what == "lora":
        w = w + FACTOR * (b @ a)
    z = (h @ w.T).float()
    if what == "support":
        outside = torch.ones(z.shape, dtype=torch.bool, device=z.device).scatter_(1, ids, False)
        z = z.masked_fill(outside, -torch.inf)
    return z.log_softmax(-1).gather(1, ids[:, : TARGETS if what == "targets" else 1])


def _run(head: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def run(hidden: Any, weight: Any, ids: Any, a: Any, b: Any, what: str) -> torch.Tensor:
        out = head(what, hidden, weight, ids, a, b)
        out.backward(torch.linspace(0.5, 1.5, out.numel(), device=out.device).view_as(out))
        return out

    return run

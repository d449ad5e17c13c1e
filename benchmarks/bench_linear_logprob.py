"""linear_logprob beside every other head: forward, and forward + backward, from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import peers, regimes, truth
from benchmarks.provider import Provider, auto_backend, device_of, too_large
from riskpo_kernels import linear_logprob, reference
from riskpo_kernels.block_selection import DEFAULT_EPS
from riskpo_kernels.head_tiles import FORWARD

PHASES = ("forward", "forward+backward", "forward+backward with entropy")
CASES: dict[str, dict[str, Any]] = {
    "small": {
        "n": 256,
        "d": 256,
        "v": 4096,
        "dtype": "float32",
        "regime": "rl",
        "zero_fraction": 0.0,
        "phase": "forward+backward",
    }
}


def inputs(
    n: int,
    d: int,
    v: int,
    dtype: str,
    regime: str,
    zero_fraction: float,
    phase: str,
    device: str = "cpu",
    rows: str | None = None,
) -> dict[str, Any]:
    """hidden [N, D], weight [V, D], target [N]; upstream gradients c of log-prob and g of entropy
    (None where the phase sends none); entropy: whether it is wanted."""
    where = torch.device(device)
    made = regimes.make(n, d, v, regime, dtype=getattr(torch, dtype), device=where, rows=rows)
    back = phase != "forward"
    c = regimes.coefficients(n, zero_fraction, where) if back else None
    g = 0.1 * c if c is not None and phase.endswith("entropy") else None
    return {
        "hidden": made.hidden.requires_grad_(back),
        "weight": made.weight.requires_grad_(back),
        "target": made.target,
        "c": c,
        "g": g,
        "entropy": phase != "forward+backward",
        "_facts": {
            "entropy_nats": made.entropy_nats,
            "active_share": made.active_share,
            "rows": made.source,
        },
    }


def providers() -> dict[str, Provider]:
    """Ours, plain PyTorch, the reference, and every peer."""
    ours = {
        "riskpo_kernels": _ours(),
        "riskpo_kernels, tail_eps=0": _ours(tail_eps=0.0),
        "riskpo_kernels, tail_eps=2^-14": _ours(tail_eps=2.0**-14),
        "riskpo_kernels, 1536 MiB": _ours(memory_mib=1536),
        "riskpo_kernels, one-kernel forward": _one_kernel("gemm"),
        "riskpo_kernels, one-kernel forward, specialised": _one_kernel("gemm, warp-specialised"),
    }
    exact = Provider(
        _run(lambda h, w, t, e: reference.linear_logprob(h, w, t, return_entropy=e)[:2]),
        kind="plain",
        why_not=lambda x: too_large(x, 24.0 * x["target"].numel() * x["weight"].shape[0]),
        units=lambda sizes, facts: 2 if sizes["phase"] == "forward" else 6,
    )
    return ours | {"reference": exact} | {n: _peer(n, head) for n, head in peers.HEADS.items()}


def cost(
    n: int, d: int, v: int, dtype: str, regime: str, zero_fraction: float, phase: str
) -> dict[str, float]:
    """Least bytes (inputs read once, gradients written once) and the flops of the products that
    any dense method needs; what a provider executes is in its units."""
    size = getattr(torch, dtype).itemsize
    passes = 1 if phase == "forward" else 2
    return {
        "bytes": float(size * (n * d + v * d) * passes + 20 * n),
        "flops": float(n) * d * v * (2 if phase == "forward" else 6),
    }


def truths(given: dict[str, Any]) -> truth.Head:
    """What errors are measured against."""
    return truth.Head(given)


def errors(provider: Provider, given: dict[str, Any], exact: truth.Head) -> dict[str, float]:
    """Errors of a provider on the rows of `exact`."""
    return exact.errors(provider.run, provider.per_token)


def _run(head: Callable[..., Any]) -> Callable[..., Any]:
    """head(hidden, weight, target, entropy) with the upstream gradients sent back."""

    def run(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        c: torch.Tensor | None,
        g: torch.Tensor | None,
        entropy: bool,
    ) -> Any:
        if c is None:
            with torch.no_grad():
                return head(hidden, weight, target, entropy)
        logprob, h = head(hidden, weight, target, entropy)
        if g is None:
            torch.autograd.backward([logprob], [c])
        else:
            torch.autograd.backward([logprob, h], [c.to(logprob.dtype), g.to(h.dtype)])
        return logprob, h

    return run


def _ours(**options: Any) -> Provider:
    def head(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, entropy: bool) -> Any:
        return linear_logprob(h, w, t, return_entropy=entropy, **options)[:2]

    def why_not(given: dict[str, Any]) -> str | None:
        forward = given["c"] is None
        eps = options.get("tail_eps")
        if eps is not None and forward:
            return "tail_eps acts in the backward only"
        if eps is not None and eps == default_tail_eps(given["hidden"].dtype):
            return "the default for this dtype"
        if "memory_mib" in options and device_of(given).type != "cuda":
            return "the larger workspace is measured on CUDA only"
        return None

    return Provider(
        _run(head),
        kind="ours",
        why_not=why_not,
        backend=auto_backend("linear_logprob"),
    )


def _one_kernel(way: str) -> Provider:
    """Our forward with its product and statistics in one kernel, beside the one with two."""
    usual = _ours()

    def run(**given: Any) -> Any:
        token = FORWARD.set(way)
        try:
            return usual.run(**given)
        finally:
            FORWARD.reset(token)

    def why_not(given: dict[str, Any]) -> str | None:
        device = device_of(given)
        if device.type != "cuda" or given["hidden"].dtype == torch.float32:
            return "needs a CUDA device and 16-bit inputs"
        if given["c"] is not None:
            return "differs in the forward only"
        if "specialised" in way and torch.cuda.get_device_capability(device)[0] != 9:
            return "is made for compute capability 9"
        return None

    return Provider(run, kind="ours", why_not=why_not, backend=usual.backend)


def default_tail_eps(dtype: torch.dtype) -> float:
    """What tail_eps=None means."""
    return DEFAULT_EPS.get(dtype, 0.0)


def _peer(name: str, head: peers.Head) -> Provider:
    def why_not(given: dict[str, Any]) -> str | None:
        h, w = given["hidden"], given["weight"]
        if not head.per_token and (given["c"] is None or bool((given["c"] == 0).any())):
            return "a mean over all rows, its gradient made in the forward: only forward+backward"
        if given["g"] is not None and not head.entropy:
            return "returns no entropy"
        reason = head.why_not(h.device, h.dtype)
        return reason or too_large(given, head.materialises * h.shape[0] * w.shape[0])

    def mean(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **_: Any) -> Any:
        loss = head.call(hidden, weight, target)
        loss.backward()
        return loss

    forward, backward = head.units
    return Provider(
        _run(head.call) if head.per_token else mean,
        kind="plain" if name.startswith("plain") else "peer",
        per_token=head.per_token,
        why_not=why_not,
        backend=lambda given: head.backend(device_of(given)),
        units=lambda sizes, facts: forward if sizes["phase"] == "forward" else forward + backward,
        slow_start=head.slow_start,
    )

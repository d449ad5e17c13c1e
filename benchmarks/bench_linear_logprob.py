"""linear_logprob beside every other head: forward, and forward + backward, from hidden states."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import peers, regimes, truth
from benchmarks.provider import Provider, auto_backend, device_of, too_large
from riskpo_kernels import linear_logprob, reference
from riskpo_kernels.core.softmax import DEFAULT_EPS

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
    masked_fraction: float = 0.0,
    device: str = "cpu",
    rows: str | None = None,
) -> dict[str, Any]:
    """hidden [N, D], weight [V, D], target [N] (-100 where masked); upstream gradients c of
    log-prob and g of entropy (None where the phase sends none); entropy: whether it is wanted;
    keep: the rows that are not masked (None: all)."""
    where = torch.device(device)
    made = regimes.make(n, d, v, regime, dtype=getattr(torch, dtype), device=where, rows=rows)
    back = phase != "forward"
    c = regimes.coefficients(n, zero_fraction, where) if back else None
    g = 0.1 * c if c is not None and phase.endswith("entropy") else None
    target, keep = made.target, None
    if masked_fraction:
        masked = regimes.prompts(n, masked_fraction, where)
        target, keep = target.masked_fill(masked, truth.IGNORED), (~masked).nonzero()[:, 0]
    return {
        "hidden": made.hidden.requires_grad_(back),
        "weight": made.weight.requires_grad_(back),
        "target": target,
        "keep": keep,
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
        "riskpo_kernels, deterministic": _ours(deterministic=True),
    }
    exact = Provider(
        _run(lambda h, w, t, e, keep: reference.linear_logprob(h, w, t, return_entropy=e)[:2]),
        kind="plain",
        why_not=lambda x: too_large(x, 24.0 * x["target"].numel() * x["weight"].shape[0]),
        units=_units(2, 4),
        logits_in="float32",
        sums_in="float32",
    )
    ours |= {f"riskpo_kernels, forward {name}": _variant(name) for name in _forwards()}
    return ours | {"reference": exact} | {n: _peer(n, head) for n, head in peers.HEADS.items()}


def cost(
    n: int,
    d: int,
    v: int,
    dtype: str,
    regime: str,
    zero_fraction: float,
    phase: str,
    masked_fraction: float = 0.0,
) -> dict[str, float]:
    """Least bytes (inputs read once, gradients written once) and the flops of the products that
    any dense method needs for the rows that are not masked; what a provider executes is in its
    units."""
    size = getattr(torch, dtype).itemsize
    passes = 1 if phase == "forward" else 2
    kept = n * (1 - masked_fraction)
    return {
        "bytes": float(size * (n * d + v * d) * passes + 20 * n),
        "flops": kept * d * v * (2 if phase == "forward" else 6),
    }


def truths(given: dict[str, Any]) -> truth.Head:
    """What errors are measured against."""
    return truth.Head(given)


def errors(provider: Provider, given: dict[str, Any], exact: truth.Head) -> dict[str, float]:
    """Errors of a provider on the rows of `exact`."""
    return exact.errors(provider.run, provider.per_token)


def _run(head: Callable[..., Any]) -> Callable[..., Any]:
    """head(hidden, weight, target, entropy, keep) with the upstream gradients sent back."""

    def run(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        c: torch.Tensor | None,
        g: torch.Tensor | None,
        entropy: bool,
        keep: torch.Tensor | None,
    ) -> Any:
        if c is None:
            with torch.no_grad():
                return head(hidden, weight, target, entropy, keep)
        logprob, h = head(hidden, weight, target, entropy, keep)
        if g is None:
            torch.autograd.backward([logprob], [c])
        else:
            torch.autograd.backward([logprob, h], [c.to(logprob.dtype), g.to(h.dtype)])
        return logprob, h

    return run


def _compacted(head: Callable[..., Any]) -> Callable[..., Any]:
    """What a trainer does around a head that would multiply masked rows too: it sends the others
    alone and spreads the results. `keep` is known before; the copies are part of the time."""

    def around(
        h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, entropy: bool, keep: torch.Tensor | None
    ) -> Any:
        if keep is None:
            return head(h, w, t, entropy)
        out = head(h[keep], w, t[keep], entropy)
        return [None if x is None else x.new_zeros(t.shape).index_copy(0, keep, x) for x in out]

    return around


def _units(forward: float, backward: float) -> Callable[..., float]:
    """By the cost formula: masked rows enter no product."""

    def units(sizes: dict[str, Any], facts: dict[str, Any]) -> float:
        passes = forward if sizes["phase"] == "forward" else forward + backward
        return passes * (1 - sizes.get("masked_fraction", 0.0))

    return units


def _ours(**options: Any) -> Provider:
    def head(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, entropy: bool, keep: Any) -> Any:
        return linear_logprob(h, w, t, return_entropy=entropy, **options)[:2]

    def why_not(given: dict[str, Any]) -> str | None:
        forward = given["c"] is None
        eps = options.get("tail_eps")
        if eps is not None and forward:
            return "tail_eps acts in the backward only"
        if eps is not None and eps == default_tail_eps(given["hidden"].dtype):
            return "the default for this dtype"
        if options.keys() & {"memory_mib", "deterministic"} and device_of(given).type != "cuda":
            return "measured on CUDA only"
        return None

    return Provider(
        _run(head),
        kind="ours",
        why_not=why_not,
        backend=auto_backend("linear_logprob"),
        logits_in="float32",
        sums_in="float32",
    )


def _forwards() -> list[str]:
    """The table of forwards that the launcher and the compile gate read."""
    if importlib.util.find_spec("triton") is None:
        return []
    from riskpo_kernels.kernels.head_tile import FORWARDS

    return list(FORWARDS)


def _variant(name: str) -> Provider:
    """One of them, where it can run and is not what is launched anyway."""
    from riskpo_kernels.kernels import head_tile

    def head(*given: Any) -> Any:
        chosen = head_tile.forward_on
        head_tile.forward_on = lambda capability, tma: name
        try:
            h, w, t, e, _ = given
            return linear_logprob(h, w, t, return_entropy=e, backend="triton")[:2]
        finally:
            head_tile.forward_on = chosen

    def why_not(given: dict[str, Any]) -> str | None:
        device = device_of(given)
        if device.type != "cuda" or given["c"] is not None:
            return "the forward alone, on CUDA only"
        capability = torch.cuda.get_device_capability(device)
        if head_tile.FORWARDS[name].tma and capability < (9, 0):
            return "needs tensor maps"
        if head_tile.forward_on(capability, capability >= (9, 0)) == name:
            return "the default here"
        return None

    return Provider(
        _run(head), kind="ours", why_not=why_not, logits_in="float32", sums_in="float32"
    )


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
        rows = h.shape[0] if given["keep"] is None else given["keep"].numel()
        return reason or too_large(given, head.materialises * rows * w.shape[0])

    def mean(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        keep: torch.Tensor | None,
        **_: Any,
    ) -> Any:
        rows, ids = (hidden, target) if keep is None else (hidden[keep], target[keep])
        loss = head.call(rows, weight, ids)
        loss.backward()
        return loss

    return Provider(
        _run(_compacted(head.call)) if head.per_token else mean,
        kind="plain" if name.startswith("plain") else "peer",
        per_token=head.per_token,
        why_not=why_not,
        backend=lambda given: head.backend(device_of(given)),
        units=_units(*head.units),
        slow_start=head.slow_start,
        logits_in=head.logits_in,
        sums_in=head.sums_in,
    )

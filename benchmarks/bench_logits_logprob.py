"""logits_logprob beside plain PyTorch and TRL's op: for code that has logits [N, V] already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import peers, regimes
from benchmarks.provider import Provider, auto_backend, too_large
from benchmarks.truth import ROWS, gradients_in, relative_error
from riskpo_kernels import logits_logprob, reference

WIDTH = 256  # of the hidden states that the logits are made from; not part of the timing
CASES: dict[str, dict[str, Any]] = {
    "small": {"n": 256, "v": 4096, "dtype": "float32", "regime": "rl", "phase": "forward+backward"}
}


def inputs(
    n: int,
    v: int,
    dtype: str,
    regime: str,
    phase: str,
    device: str = "cpu",
    rows: str | None = None,
) -> dict[str, Any]:
    """logits [N, V], target [N], upstream gradients c of the log-prob (None: forward only)."""
    where = torch.device(device)
    made = regimes.make(n, WIDTH, v, regime, dtype=torch.float32, device=where, rows=rows)
    logits = torch.empty(n, v, dtype=getattr(torch, dtype), device=where)
    for start in range(0, n, 1024):
        logits[start : start + 1024] = made.hidden[start : start + 1024] @ made.weight.T
    back = phase != "forward"
    return {
        "logits": logits.requires_grad_(back),
        "target": made.target,
        "c": regimes.coefficients(n, 0.0, where) if back else None,
        "_facts": {
            "entropy_nats": made.entropy_nats,
            "active_share": made.active_share,
            "rows": made.source,
        },
    }


def providers() -> dict[str, Provider]:
    """The in-place variant comes last: it leaves gradients where the logits were."""
    module, name = "trl.kernels", "selective_log_softmax_and_entropy"
    trl, missing = peers.find(module, name)
    return {
        "reference": _provider(reference.logits_logprob, "plain", bytes_per_logit=20),
        "plain": _provider(_plain, "plain", bytes_per_logit=16),
        "TRL selective log-softmax": Provider(
            _run(lambda z, t: trl(z, t, 1.0)),
            why_not=lambda given: (
                missing or (None if given["logits"].is_cuda else "needs a CUDA device")
            ),
            backend=lambda given: "triton",
        ),
        "riskpo_kernels": _provider(logits_logprob, "ours"),
        "riskpo_kernels, in place": Provider(
            _in_place,
            kind="ours",
            why_not=lambda given: None if given["c"] is not None else "acts in the backward only",
            backend=auto_backend("logits_logprob"),
        ),
    }


def cost(n: int, v: int, dtype: str, regime: str, phase: str) -> dict[str, float]:
    """The forward reads the logits; the backward reads them and writes their gradient."""
    size = getattr(torch, dtype).itemsize
    return {"bytes": float(size * n * v * (1 if phase == "forward" else 3)), "flops": 8.0 * n * v}


def truths(given: dict[str, Any]) -> dict[str, Any]:
    """The first rows of the timed logits, and their results in float64."""
    n = ROWS.get(given["logits"].device.type, ROWS["cpu"])
    z = given["logits"].detach()[:n].clone()
    t, c = given["target"][:n], None if given["c"] is None else given["c"][:n]
    wide = z.double().requires_grad_(c is not None)
    out = reference.logits_logprob(wide, t, return_entropy=True)
    if c is not None:
        (out.logprob * c).sum().backward()
    return {"z": z, "t": t, "c": c, "logprob": out.logprob.detach(), "dz": wide.grad}


def errors(provider: Provider, given: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """Log-prob error in nats, gradient error in the relative Frobenius norm."""
    leaf = exact["z"].clone().requires_grad_(exact["c"] is not None)
    logprob = provider.run(logits=leaf, target=exact["t"], c=exact["c"]).detach()
    error = (logprob.double() - exact["logprob"]).abs().max().item()
    found: dict[str, Any] = {"logprob_error_nats": error}
    found["errors_over"] = f"the first {exact['z'].shape[0]} rows"
    if exact["c"] is not None:
        gradient = leaf.detach() if leaf.grad is None else leaf.grad  # in place: that is it
        found["gradient_error"] = relative_error(gradient, exact["dz"])
        found["gradients_in"] = gradients_in(dz=gradient)
    return found


def _plain(z: torch.Tensor, t: torch.Tensor, return_entropy: bool) -> peers.LogProbs:
    logp = torch.log_softmax(z.float(), -1)
    return logp.gather(-1, t[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


class _Attach(torch.autograd.Function):
    """The same memory as a non-leaf tensor: only those may be overwritten by their gradient."""

    @staticmethod
    def forward(ctx: Any, probe: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.view(logits.shape)

    @staticmethod
    def backward(ctx: Any, dz: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return dz.new_zeros(1), None


def _in_place(logits: torch.Tensor, target: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    probe = torch.zeros(1, device=logits.device, dtype=logits.dtype, requires_grad=True)
    z = _Attach.apply(probe, logits.detach())
    logprob = logits_logprob(z, target, return_entropy=True, inplace_backward=True).logprob
    logprob.backward(c.to(logprob.dtype))
    return logprob


def _run(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(logits: torch.Tensor, target: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        if c is None:
            with torch.no_grad():
                return op(logits, target)[0]
        logprob = op(logits, target)[0]
        logprob.backward(c.to(logprob.dtype))
        return logprob

    return run


def _provider(op: Callable[..., Any], kind: str, bytes_per_logit: float = 0.0) -> Provider:
    return Provider(
        _run(lambda z, t: op(z, t, return_entropy=True)),
        kind=kind,
        why_not=lambda given: too_large(given, bytes_per_logit * given["logits"].numel()),
        backend=auto_backend("logits_logprob") if kind == "ours" else lambda given: "torch",
    )

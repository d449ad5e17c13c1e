"""Errors against the reference in float64, on a few hundred rows of the timed inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from riskpo_kernels import reference

ROWS = {"cpu": 128, "cuda": 1024}


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative Frobenius norm of the difference."""
    return ((x.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()


class Head:
    """The rows taken from a head's inputs, and their fp64 results; each is computed once."""

    def __init__(self, inputs: dict[str, Any]):
        n = inputs["target"].numel()
        size = min(n, ROWS.get(inputs["target"].device.type, ROWS["cpu"]))
        at = torch.linspace(0, n - 1, size, device=inputs["target"].device).long()
        self.hidden = inputs["hidden"].detach()[at]
        self.weight = inputs["weight"].detach()
        self.target = inputs["target"][at]
        self.c, self.g = (None if inputs[k] is None else inputs[k][at] for k in ("c", "g"))
        self.wants_entropy = inputs["entropy"]

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Fresh hidden and weight that collect gradients."""
        tensors = (self.hidden, self.weight)
        return tuple(x.to(dtype or x.dtype).detach().clone().requires_grad_() for x in tensors)  # type: ignore[return-value]

    @functools.cached_property
    def per_token(self) -> dict[str, torch.Tensor]:
        """logprob, entropy and, with upstream gradients, dh and dw."""
        h, w = self.leaves(torch.float64)
        out = reference.linear_logprob(h, w, self.target, return_entropy=True)
        results = {"logprob": out.logprob.detach(), "entropy": out.entropy.detach()}
        if self.c is not None:
            total = (out.logprob * self.c).sum()
            if self.g is not None:
                total = total + (out.entropy * self.g).sum()
            total.backward()
            results |= {"dh": h.grad, "dw": w.grad}
        return results

    @functools.cached_property
    def mean(self) -> dict[str, torch.Tensor]:
        """The mean negative log-prob and its gradients."""
        h, w = self.leaves(torch.float64)
        loss = -reference.linear_logprob(h, w, self.target).logprob.mean()
        loss.backward()
        return {"loss": loss.detach(), "dh": h.grad, "dw": w.grad}

    def errors(self, run: Callable[..., Any], per_token: bool) -> dict[str, float]:
        """Errors of a provider's run(hidden, weight, target, c, g, entropy) on these rows."""
        h, w = self.leaves() if self.c is not None else (self.hidden, self.weight)
        out = run(
            hidden=h, weight=w, target=self.target, c=self.c, g=self.g, entropy=self.wants_entropy
        )
        found: dict[str, float] = {}
        if per_token:
            truth = self.per_token
            found["logprob_error_nats"] = (
                (out[0].detach().double() - truth["logprob"]).abs().max().item()
            )
            if out[1] is not None:
                found["entropy_error_nats"] = (
                    (out[1].detach().double() - truth["entropy"]).abs().max().item()
                )
        else:
            truth = self.mean
            found["loss_error"] = (out.detach().double() - truth["loss"]).abs().item()
        if self.c is not None:
            found["dh_error"] = relative_error(h.grad, truth["dh"])
            found["dw_error"] = relative_error(w.grad, truth["dw"])
            found["gradient_error"] = max(found["dh_error"], found["dw_error"])
        return found

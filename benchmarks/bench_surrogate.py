"""clipped_surrogate, forward and backward, on packed log-probs: a few hundred ragged responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.provider import Provider
from riskpo_kernels import clipped_surrogate

CASES: dict[str, dict[str, Any]] = {
    "sequence-64x1k": {"sequences": 64, "mean_tokens": 1024, "ratio": "sequence"},
    "sequence-512x2k": {"sequences": 512, "mean_tokens": 2048, "ratio": "sequence"},
    "token-512x2k": {"sequences": 512, "mean_tokens": 2048, "ratio": "token"},
    "sequence-8x32k": {"sequences": 8, "mean_tokens": 32768, "ratio": "sequence"},
}


def lengths(sequences: int, mean_tokens: int) -> torch.Tensor:
    """[S] tokens, uniform in 1 to twice the mean."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 2 * mean_tokens, (sequences,), generator=generator)


def inputs(sequences: int, mean_tokens: int, ratio: str, device: str = "cpu") -> dict[str, Any]:
    """A step that is slightly off-policy, with the KL and the entropy terms; float32."""
    sizes = lengths(sequences, mean_tokens)
    n = int(sizes.sum())
    generator = torch.Generator().manual_seed(1)
    logprob = -torch.rand(n, generator=generator)
    tensors = {
        "logprob": logprob,
        "old_logprob": logprob + 0.1 * torch.randn(n, generator=generator),
        "ref_logprob": logprob + 0.2 * torch.randn(n, generator=generator),
        "entropy": torch.rand(n, generator=generator),
        "advantage": torch.randn(sequences, generator=generator),
        "cu_seqlens": torch.cat((torch.zeros(1), sizes.cumsum(0))).int(),
    }
    moved = {name: x.to(device) for name, x in tensors.items()}
    moved["logprob"].requires_grad_()
    moved["entropy"].requires_grad_()
    return moved | {"ratio": ratio, "kl_coef": 0.01, "entropy_coef": 0.001}


def providers() -> dict[str, Provider]:
    """Each takes inputs() as keywords and returns the gradients of logprob and entropy."""
    return {
        "riskpo_kernels, torch": Provider(_step("torch"), kind="ours"),
        "reference": Provider(_step("reference"), kind="plain"),
    }


def cost(sequences: int, mean_tokens: int, ratio: str) -> dict[str, float]:
    """Least bytes moved (4 arrays in, 2 slopes out, then both read and both gradients written;
    the second read of two arrays comes from the cache) and arithmetic operations."""
    n = int(lengths(sequences, mean_tokens).sum())
    return {"bytes": 4.0 * 10 * n, "flops": 32.0 * n}


def _step(backend: str) -> Callable[..., Any]:
    def run(**arguments: Any) -> Any:
        loss, _ = clipped_surrogate(**arguments, backend=backend)
        return torch.autograd.grad(loss, (arguments["logprob"], arguments["entropy"]))

    return run

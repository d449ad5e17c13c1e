"""linear_logprob over 20 sequence lengths it has not seen: a recompile per length shows here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import bench_linear_logprob, peers
from benchmarks.provider import Provider

LENGTHS = 20
CASES: dict[str, dict[str, Any]] = {
    "small": {"d": 256, "v": 2048, "dtype": "float32", "most": 64},
}


def inputs(
    d: int, v: int, dtype: str, most: int, device: str = "cpu", rows: str | None = None
) -> dict[str, Any]:
    """As bench_linear_logprob, with `most` rows of which each call takes other numbers."""
    return bench_linear_logprob.inputs(
        most, d, v, dtype, "rl", 0.0, "forward+backward", device=device, rows=rows
    )


def providers() -> dict[str, Provider]:
    """Ours, plain, and the peers that return per-token log-probs."""
    heads = bench_linear_logprob.providers()
    names = ["riskpo_kernels", *peers.HEADS]
    return {n: _over_lengths(heads[n]) for n in names if heads[n].per_token}


def cost(d: int, v: int, dtype: str, most: int) -> dict[str, float]:
    """Of 20 calls of three quarters of `most` rows on average."""
    n = LENGTHS * 3 * most // 4
    return bench_linear_logprob.cost(n, d, v, dtype, "rl", 0.0, "forward+backward")


def _over_lengths(head: Provider) -> Provider:
    most_calls = itertools.count()
    run_one: Callable[..., Any] = head.run

    def run(hidden: torch.Tensor, target: torch.Tensor, c: torch.Tensor, **rest: Any) -> None:
        n = target.numel()
        first = next(most_calls)
        for i in range(LENGTHS):
            # odd strides visit new lengths in [n / 2, n] in every call
            length = n // 2 + ((first * LENGTHS + i) * 37 + 11) % (n - n // 2)
            run_one(hidden=hidden[:length], target=target[:length], c=c[:length], **rest)

    return Provider(
        run,
        kind=head.kind,
        why_not=head.why_not,
        backend=head.backend,
        slow_start=head.slow_start,
    )

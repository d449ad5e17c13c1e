"""Inputs for the tests of clipped_surrogate, and one way to run it: values, slopes, stats."""

import pytest
import torch

from riskpo_kernels import clipped_surrogate
from tests.compare import assert_all_close_as_plain
from tests.conftest import has_triton

# of the head; the policy loss is one pass of PyTorch whatever the backend is called
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason="no triton"))
BACKENDS = ["torch"]
ALL = ["reference", "torch"]
AGGREGATES = ("sequence-mean", "token-mean", "sequence-sum", "sequence-sum-norm")
LENGTHS = (7, 0, 23, 1, 40, 5, 16, 9, 31, 12, 3, 20, 14, 8, 27, 18)
WIDE = {  # clip bounds inside the spread of the ratios below
    "sequence": {"clip_low": 0.04, "clip_high": 0.05},
    "token": {"clip_low": 0.15, "clip_high": 0.1},
}


def tokens(device="cpu", dtype=torch.float32, lengths=LENGTHS, seed=0):
    """Flat tensors by argument name; old log-probs near the new ones, a part of them further."""
    g = torch.Generator().manual_seed(seed)
    n, s = sum(lengths), len(lengths)

    def normal(*size):
        return torch.randn(*size, generator=g)

    new = -torch.rand(n, generator=g) * 3 - 0.01
    shift = (0.1 * normal(s)).repeat_interleave(torch.tensor(lengths))
    x = {
        "logprob": new,
        "old_logprob": new + shift + 0.2 * normal(n),
        "advantage": (normal(s).abs() + 0.1) * torch.tensor([1.0, -1.0]).repeat(s)[:s],
        "ref_logprob": new + 0.3 * normal(n),
        "entropy": torch.rand(n, generator=g),
        "correction": torch.rand(s, generator=g) + 0.5,
    }
    x = {name: value.to(device, dtype) for name, value in x.items()}
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    mask = (torch.rand(n, generator=g) > 0.2).to(device)
    return x, cu, mask


def padded(x, cu, *, left=False, fill=float("nan")):
    """Flat [N] as [S, T]; what stands in the padding must not matter."""
    rows = [x[a:b] for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)]
    width = max(len(r) for r in rows)
    out = x.new_full((len(rows), width), fill)
    for i, row in enumerate(rows):
        out[i, width - len(row) if left else 0 :][: len(row)] = row
    return out


def run(x, *, upstream=1.0, **options):
    """Results by name: loss, gradients and stats; the inputs come back untouched."""
    x = {name: value.detach().clone() for name, value in x.items()}
    before = {name: value.clone() for name, value in x.items()}
    leaves = [x["logprob"].requires_grad_()]
    if options.get("entropy_coef"):
        leaves.append(x["entropy"].requires_grad_())
    loss, stats = clipped_surrogate(**x, **options)
    gradients = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))
    for name, value in before.items():
        assert torch.equal(x[name].detach().nan_to_num(), value.nan_to_num()), name
        assert x[name]._version == 0, name
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
    assert all(not y.requires_grad and y.dim() == 0 for y in stats.values())
    names = ("dlogprob", "dentropy")
    return {"loss": loss.detach(), **dict(zip(names, gradients, strict=False)), **stats}


def check(x, *, backend, **options):
    """The one rule: truth is the float64 reference, plain the reference in the same dtype.

    The loss sums terms of both signs, so its error is judged beside their size, for which the
    sum of the slopes' magnitudes stands.
    """
    exact = {name: value.double() for name, value in x.items()}
    got = run(x, backend=backend, **options)
    truth = run(exact, backend="reference", **options)
    plain = run(x, backend="reference", **options)
    size = truth["dlogprob"].abs().sum()
    size = size + truth["loss"].abs()
    assert_all_close_as_plain(got, truth, plain, sizes={"loss": size})
    return got, truth

"""A NaN in the inputs is a NaN in the results, never a certain or an impossible token."""

import pytest
import torch

from riskpo_kernels import linear_logprob, logits_logprob, reference
from tests.conftest import has_triton

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason=""))]
WIDE, N = 300, 6


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch):
    """A device's maximum of a NaN and a number is the number; numpy's is not."""
    if has_triton():
        import numpy as np
        from triton.runtime import interpreter

        def number(self, a, b):
            return self.binary_op(a, b, np.fmax)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_maxnumf", number)


def inputs(where, device):
    """hidden, weight, target and the rows whose softmax holds a NaN."""
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(N, 16, generator=g), torch.randn(WIDE, 16, generator=g)
    target = torch.tensor([5, 290, 7, 7, 131, 0])
    rows = torch.full((N,), True)
    if where == "a hidden state":
        h[2, 3] = torch.nan
        rows = torch.arange(N) == 2
    else:  # some rows' target, or nobody's
        w[7 if where == "a target's row of the head" else 200] = torch.nan
    return h.to(device), w.to(device), target.to(device), rows.to(device)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen head"])
@pytest.mark.parametrize(
    "where", ["a hidden state", "a row of the head", "a target's row of the head"]
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail_eps", [0.0, 1e-3])
def test_linear(backend, where, frozen, tail_eps, device):
    h, w, target, rows = inputs(where, device)
    h.requires_grad_()
    w.requires_grad_(not frozen)
    want = reference.linear_logprob(h, w, target)
    assert (want.logprob.isnan() == rows).all(), "the reference sees it"
    out = linear_logprob(h, w, target, return_entropy=True, tail_eps=tail_eps, backend=backend)
    out.logprob.sum().backward()
    for result in (out.logprob, out.entropy, out.lse):
        assert (result.isnan() == rows).all(), result
    assert (h.grad.isnan().any(1) == rows).all()
    if not frozen:
        assert w.grad.isnan().any()


@pytest.mark.parametrize("column", [7, 200], ids=["target", "another"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits(backend, column, device):
    z = torch.randn(N, WIDE, generator=torch.Generator().manual_seed(0)).to(device)
    z[2, column] = torch.nan
    z.requires_grad_()
    out = logits_logprob(z * 1, torch.full((N,), 7, device=device), backend=backend)
    out.logprob.sum().backward()
    rows = torch.arange(N, device=device) == 2
    assert (out.logprob.isnan() == rows).all() and (z.grad.isnan().any(1) == rows).all()

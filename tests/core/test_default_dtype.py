"""torch.set_default_dtype, as people call it to load a model, changes no result."""

import contextlib

import pytest
import torch

from riskpo_kernels import (
    RiskPOAdvantage,
    add_fused_lm_head,
    linear_divergence,
    linear_logprob,
    logits_logprob,
    riskpo_loss,
)
from tests.conftest import has_triton
from tests.toy import tiny_policy

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason=""))]
N, D, V = 12, 32, 300


@contextlib.contextmanager
def default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def backward(out, *leaves):
    """Results and gradients; upstream gradients not uniform."""
    for x in leaves:
        x.grad = None
    out = [x for x in out if x is not None]
    c = torch.linspace(0.5, 1.5, N, dtype=torch.float32)
    sum((c * x).sum() for x in out).backward()
    return [*(x.detach() for x in out), *(x.grad.clone() for x in leaves)]


def every_op(backend, device):
    """Of each head op on one backend, and of what is called around it."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        x = torch.randn(*shape, generator=g, dtype=torch.float32)
        return x.to(device).requires_grad_()

    h, w, b, down, up = draw(N, D), draw(V, D), draw(V), draw(4, D), draw(V, 4)
    target = torch.arange(N, device=device) * 20
    ids = torch.stack([target, target + 1, target + 7], 1)
    given = {"return_entropy": True, "temperature": 0.7, "backend": backend}
    yield "dense", backward(linear_logprob(h, w, target, bias=b, tail_eps=0.0, **given), h, w, b)
    yield "sparse", backward(linear_logprob(h, w, target, tail_eps=2.0**-8, **given), h, w)
    yield "support", backward(linear_logprob(h, w, target, support=ids, **given), h, w)
    if backend == "torch":
        lora = {"lora": (down, up, 0.5), **given}
        yield "LoRA", backward(linear_logprob(h, w.detach(), target, **lora), h, down, up)
    z = draw(N, V)
    yield "logits", backward(logits_logprob(z, target, **given), z)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        teacher = h.detach().flip(0), w.detach().flip(0)
        out = linear_divergence(h, w, *teacher, kind=kind, tail_eps=2.0**-10, backend=backend)
        yield kind, backward([out], h, w)


def around(device):
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float32)
    question = torch.arange(3).repeat_interleave(2)
    advantage, _ = RiskPOAdvantage("paper", bundle_size=3)(rewards, question, step=0)
    yield "advantage", [advantage]
    g = torch.Generator().manual_seed(1)
    h, w = (torch.randn(*s, generator=g, dtype=torch.float32) for s in ((N, D), (V, D)))
    h, w, target = h.to(device).requires_grad_(), w.to(device), torch.arange(N, device=device)
    starts = torch.arange(0, N + 1, 2, device=device, dtype=torch.int32)
    old = torch.full((N,), -5.0, dtype=torch.float32, device=device)
    loss = riskpo_loss(h, w, target, old, advantage.to(device), cu_seqlens=starts).loss
    loss.backward()
    yield "loss", [loss.detach(), h.grad]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_result_depends_on_it(backend, dtype, device):
    truth = dict(every_op(backend, device)) | dict(around(device))
    with default(dtype):
        got = dict(every_op(backend, device)) | dict(around(device))
    for name, results in truth.items():
        for x, y in zip(results, got[name], strict=True):
            assert x.dtype == y.dtype and torch.equal(x, y), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_heads_maths_is_found_under_it(dtype):
    model = tiny_policy().model
    ids = torch.arange(8)[None]
    handle = add_fused_lm_head(model)
    truth = model(input_ids=ids, labels=ids, fused_lm_head=True)
    handle.remove()
    with default(dtype):
        handle = add_fused_lm_head(model)
        got = model(input_ids=ids, labels=ids, fused_lm_head=True)
    handle.remove()
    assert torch.equal(got.log_probs, truth.log_probs) and torch.equal(got.entropy, truth.entropy)

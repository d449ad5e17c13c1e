"""torch.autocast around the ops changes nothing: their precision is their own (trap 17).

What reaches them may be 16-bit, because a layer before them ran in it; then 16-bit hidden states
with a float32 head compute in float32, as without autocast."""

import pytest
import torch

from riskpo_kernels import clipped_surrogate, linear_logprob, logits_logprob
from riskpo_kernels.core.operators import exact_products
from tests.head_inputs import head
from tests.surrogate_inputs import tokens


def gradients(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def head_loss(h, w, target, backend):
    out = linear_logprob(h, w, target, return_entropy=True, backend=backend)
    assert out.logprob.dtype == torch.float32
    return out.logprob.sum() + 0.1 * out.entropy.sum()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
def test_head(backend, hidden, device):
    h, w, _, target = head(30, 300, 64, torch.float32, device)
    leaves = [h.to(hidden).requires_grad_(), w.requires_grad_()]
    results = []
    for dtype in (None, torch.bfloat16):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss = head_loss(*leaves, target, backend)
            if backend != "reference":  # whose backward is PyTorch's own products
                grads = gradients(loss, *leaves)  # under autocast, as some loops have it
        results.append(gradients(loss, *leaves) if backend == "reference" else grads)
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("kind", ["several", "support", "lora"])
def test_products_of_few_columns(kind, device):
    """Both passes run products that autocast would round; register keeps it out of each."""
    h, w, _, target = head(30, 300, 64, torch.float32, device)
    ids = torch.stack([target, (target + 7) % 300], 1)
    lora = (torch.randn(4, 64, device=device), torch.randn(300, 4, device=device), 0.5)
    leaves = [h.requires_grad_(), w if kind != "lora" else lora[0]]
    leaves[1].requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            given = {"support": {"support": ids}, "lora": {"lora": lora}}.get(kind, {})
            out = linear_logprob(h, w, ids if kind == "several" else target, **given)
            results.append(gradients(out.logprob.sum() + out.lse.sum(), *leaves))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_logits_and_surrogate(backend, device):
    z = (torch.randn(30, 300, device=device) * 5).requires_grad_()
    target = torch.randint(300, (30,), device=device)
    x, cu, _ = tokens(device)
    x = {k: x[k] for k in ("logprob", "old_logprob", "advantage")}
    new = x["logprob"].requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
            first = gradients(logits_logprob(z, target, backend=backend).logprob.sum(), z)
            loss = clipped_surrogate(**x, cu_seqlens=cu, backend=backend).loss
            results.append([*first, *gradients(loss, new)])
    for x, y in zip(*results, strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y)


def test_autocast_does_change_a_plain_product(device):
    """The control: this is what the ops are kept from."""
    h, w, *_ = head(30, 300, 64, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert (h @ w.T).dtype == torch.bfloat16


def test_no_switch_of_a_gpu_reaches_the_products():
    """TF32 and sums in fp16, which a user may have turned on, and gets back."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision, matmul.allow_fp16_accumulation
    try:
        matmul.fp32_precision, matmul.allow_fp16_accumulation = "tf32", True
        with exact_products(torch.device("cuda")):
            assert (matmul.fp32_precision, matmul.allow_fp16_accumulation) == ("ieee", False)
        assert (matmul.fp32_precision, matmul.allow_fp16_accumulation) == ("tf32", True)
    finally:
        matmul.fp32_precision, matmul.allow_fp16_accumulation = before

"""ignore_index=None: no row is ignored, and the forward neither waits for the device nor makes a
tensor whose size depends on values; so a CUDA graph can hold it (trap 43), and its backward."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from riskpo_kernels import linear_logprob, logits_logprob, reference, riskpo_loss
from riskpo_kernels.core.matmul import Options
from riskpo_kernels.lm_head import backward as head_backward
from riskpo_kernels.lm_head import backward_operator as head_back
from riskpo_kernels.lm_head import logits_operator as logits_op
from riskpo_kernels.lm_head import operator as head_op
from tests.compare import errors
from tests.conftest import has_triton
from tests.head_inputs import head
from tests.lm_head.test_sparse_blocks import peaked

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason=""))]
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")


def head_forward(*given):
    return head_op.forward(*given[:5], Options(*given[5:]))


def head_backward_pass(needs, *given):
    upstream, tensors, found = given[:3], given[3:8], given[8:17]
    return head_back.backward_sums(needs, upstream, tensors, found, Options(*given[17:]))


class NoWait(TorchDispatchMode):
    """Raises at every operator that would make the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        forwards = {
            head_op.head_operator.operator: head_forward,
            logits_op.logits_operator: logits_op._forward,
            head_op.head_operator.backward: head_backward_pass,
        }
        for own, forward in forwards.items():
            if func is own:  # opaque: what it calls is what matters
                with self:
                    return forward(*args)
        name = func._schema.name.removeprefix("aten::")
        assert name not in WAITS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_logprob_without_a_wait(backend, device):
    h, w, b, target = head(30, 300, 16, torch.float32, device)
    t = torch.linspace(0.5, 1.5, 30, device=device)
    options = dict(bias=b, temperature=t, return_entropy=True, backend=backend)
    with torch.no_grad(), NoWait():
        got = linear_logprob(h, w, target, ignore_index=None, **options)
    want = linear_logprob(h, w, target, **options)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    # the mode does see the usual call's wait; a device's, and that of the kernels, is no operator
    if device.type == "cpu" and backend == "torch":
        target[2] = -100
        with pytest.raises(AssertionError, match="waits"), NoWait():
            linear_logprob(h, w, target, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_logprob_without_a_wait(backend, device):
    h, w, b, target = head(30, 300, 16, torch.float32, device)
    z = h @ w.T + b
    with torch.no_grad(), NoWait():
        got = logits_logprob(z, target, ignore_index=None, return_entropy=True, backend=backend)
    want = logits_logprob(z, target, return_entropy=True, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert torch.equal(z, h @ w.T + b), "the logits were written to"


def refused(*_, **__):
    raise AssertionError("the host and the device exchange numbers")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{"tail_eps": 2.0**-14}, {"tail_eps": 2.0**-14, "deterministic": True}, {"tail_eps": 0.0}],
    ids=str,
)
def test_backward_in_a_graph_asks_nothing(backend, options, device, monkeypatch, recomputed):
    """With the sizes of the worst case, in several groups of blocks and pieces of rows; rows that
    were sent nothing are not read. The gradients are those of the call that asks."""
    h, w, target = (x.to(device) for x in peaked(36, 700, 16))
    h[::9] = 0.01  # flat: the dense way, if anyone asked
    c = torch.linspace(-1, 1, 36, device=device) * (torch.arange(36, device=device) % 3 > 0)
    h[3::9] = torch.nan  # nothing is sent to these
    bias = torch.linspace(-1, 1, 700, device=device)
    monkeypatch.setattr(head_backward, "_piece", lambda *_: 20)
    found = []
    for captured in (False, True):
        leaves = [x.clone().requires_grad_() for x in (h, w, bias)]
        out = linear_logprob(
            *leaves[:2],
            target,
            bias=leaves[2],
            return_entropy=True,
            ignore_index=None,
            memory_mib=0.6,
            backend=backend,
            **options,
        )
        with monkeypatch.context() as patch:
            if captured:
                patch.setattr(head_backward, "is_captured", lambda device: True)
                patch.setattr(torch.Tensor, "tolist", refused)
                patch.setattr(torch, "tensor", refused)
                with NoWait():
                    torch.autograd.backward((out.logprob, out.entropy), (c, 0.1 * c))
            else:
                torch.autograd.backward((out.logprob, out.entropy), (c, 0.1 * c))
        found.append([x.grad for x in leaves])
    for got, want in zip(found[1], found[0], strict=True):
        assert want.isfinite().all() and want.abs().max() > 0.05
        assert (got - want).abs().max() < 2e-3 * want.abs().max()
    if backend == "triton" and options["tail_eps"] and "deterministic" not in options:
        assert (found[0][0][3::9] == 0).all() and (found[1][0][3::9] == 0).all()


def test_sixteen_bit_forward_selects_blocks_without_a_wait():
    """On a CPU the selection of blocks may ask the host; a meta tensor has no values to ask for."""
    h = torch.empty(30, 16, dtype=torch.bfloat16, device="meta")
    w = torch.empty(300, 16, dtype=torch.bfloat16, device="meta")
    target = torch.empty(30, dtype=torch.int64, device="meta")
    options = dict(return_entropy=True, backend="torch")
    with NoWait():
        out = linear_logprob(h, w, target, ignore_index=None, **options)
    assert out.logprob.shape == (30,) and out.logprob.dtype == torch.float32
    with pytest.raises(NotImplementedError, match="meta"), NoWait():
        linear_logprob(h, w, target, **options)  # the usual call does wait


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradients_are_those_of_the_checked_call(backend, device):
    h, w, _, target = head(30, 300, 16, torch.float32, device)
    mask = torch.rand(30, device=device) > 0.3
    advantage = torch.tensor([1.0, -0.5, 2.0], device=device)
    cu = torch.tensor([0, 7, 19, 30], dtype=torch.int32, device=device)
    results = []
    for ignore in (None, -100):
        hh, ww = h.clone().requires_grad_(), w.clone().requires_grad_()
        options = dict(cu_seqlens=cu, mask=mask, entropy_coef=0.01, backend=backend)
        loss, stats = riskpo_loss(hh, ww, target, None, advantage, ignore_index=ignore, **options)
        loss.backward()
        results.append((loss, hh.grad, ww.grad, stats["tokens"]))
    for x, y in zip(*results, strict=True):
        assert torch.allclose(x, y, atol=1e-7)
    assert results[0][3] == mask.sum()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unchecked_id_outside_the_vocabulary_is_seen(backend, device):
    h, w, _, target = head(8, 300, 16, torch.float32, device)
    target[3], target[5] = 300, -7
    out = linear_logprob(h, w, target, ignore_index=None, tail_eps=1e-3, backend=backend)
    bad = torch.zeros(8, dtype=torch.bool, device=device)
    bad[[3, 5]] = True
    assert (out.logprob[bad] == -torch.inf).all()
    good = reference.linear_logprob(h[~bad], w, target[~bad])
    assert torch.allclose(out.logprob[~bad], good.logprob, atol=1e-5)
    assert (logits_logprob(h @ w.T, target, ignore_index=None).logprob[bad] == -torch.inf).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_in_a_cuda_graph(dtype):
    """Captured once, replayed on new inputs: the eager numbers."""
    h, w, b, target = head(512, 3000, 64, dtype, "cuda")

    def forward():
        return linear_logprob(h, w, target, bias=b, return_entropy=True, ignore_index=None)

    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        forward()  # kernels compile before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = forward()
    h.copy_(head(512, 3000, 64, dtype, "cuda", seed=5)[0])
    graph.replay()
    for x, y in zip(captured, forward(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_backward_in_a_cuda_graph(dtype):
    """Both passes, captured once and replayed on other rows."""
    h, w, _, target = head(512, 3000, 64, dtype, "cuda")
    h.requires_grad_(), w.requires_grad_()

    def both():
        out = linear_logprob(h, w, target, ignore_index=None)
        return torch.autograd.grad(out.logprob.sum(), (h, w))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both()  # kernels compile before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    with torch.no_grad():
        h.copy_(head(512, 3000, 64, dtype, "cuda", seed=5)[0])
    graph.replay()
    for x, y in zip(captured, both(), strict=True):
        assert errors(x, y)[0] < 0.01


@pytest.mark.gpu
def test_forward_under_sync_debug_mode():
    h, w, _, target = head(512, 3000, 64, torch.bfloat16, "cuda")
    linear_logprob(h, w, target, ignore_index=None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_logprob(h, w, target, return_entropy=True, ignore_index=None)
    finally:
        torch.cuda.set_sync_debug_mode("default")

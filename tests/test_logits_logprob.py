"""logits_logprob: values and gradients against float64, in every backend."""

import pytest
import torch

from riskpo_kernels import logits_logprob, reference
from tests.compare import assert_all_close_as_plain
from tests.conftest import has_triton
from tests.head_inputs import head, run, split_columns, upstream

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason=""))]


def logits_and_target(shape, vocab, dtype, device, seed=0):
    n = 1
    for size in shape:
        n *= size
    h, w, b, target = head(n, vocab, 16, torch.float32, device, seed=seed)
    return (h @ w.T + b).to(dtype).view(*shape, vocab), target.view(shape)


def three(z, target, *, backend, **options):
    tensors = {"logits": z}
    exact = {"logits": z.double()}
    return (
        run(logits_logprob, tensors, target, backend=backend, **options),
        run(reference.logits_logprob, exact, target, **options),
        run(reference.logits_logprob, tensors, target, **options),
    )


def dtypes(backend, device):
    wide = [] if backend == "triton" else [torch.float64]
    # the kernels widen right after the load, so bf16 is right in the interpreter too, but its
    # float32 -> bf16 stores truncate there
    bf16 = [] if backend == "triton" and device.type == "cpu" else [torch.bfloat16]
    return [*wide, torch.float32, torch.float16, *bf16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [((37,), 613), ((2, 5), 512), ((1,), 1), ((9,), 3)], ids=str)
def test_matches_reference(backend, shape, device):
    for dtype in dtypes(backend, device):
        z, target = logits_and_target(*shape, dtype, device)
        if target.numel() > 3:
            target.view(-1)[3] = -100
        assert_all_close_as_plain(*three(z, target, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.3},
        {"softcap": 5.0},
        {"softcap": 60.0},
        {"c": False},
        {"g": False, "e": False},
        {"c": False, "g": False, "softcap": 5.0},
    ],
    ids=str,
)
def test_options_match_reference(backend, options, device):
    z, target = logits_and_target((20,), 300, torch.float32, device)
    assert_all_close_as_plain(*three(z, target, backend=backend, **options))
    per_row = torch.linspace(0.3, 1.5, 20, device=device)
    options = {k: v for k, v in options.items() if k != "temperature"}
    assert_all_close_as_plain(*three(z, target, backend=backend, temperature=per_row, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_are_read_where_they_are(backend, device):
    """Trap 14: logits[:, :-1] cannot be viewed as one matrix, and is not copied into one."""
    z, target = logits_and_target((3, 9), 130, torch.float32, device)
    leaf = z.clone().requires_grad_()
    out = logits_logprob(leaf[:, :-1], target[:, 1:], return_entropy=True, backend=backend)
    want = reference.logits_logprob(z[:, :-1].double(), target[:, 1:], return_entropy=True)
    assert torch.allclose(out.logprob.double(), want.logprob, atol=1e-5)
    c, g = upstream(out.logprob.shape, device)
    ((out.logprob * c).sum() + (out.entropy * g).sum()).backward()
    truth = z.double().requires_grad_()
    want = reference.logits_logprob(truth[:, :-1], target[:, 1:], return_entropy=True)
    ((want.logprob * c).sum() + (want.entropy * g).sum()).backward()
    assert torch.allclose(leaf.grad.double(), truth.grad, atol=1e-5)
    assert (leaf.grad[:, -1] == 0).all()
    transposed = z.transpose(0, 1)
    out = logits_logprob(transposed, target.T, backend=backend).logprob
    assert torch.allclose(out, logits_logprob(z, target, backend=backend).logprob.T)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_backward(backend, device):
    z, target = logits_and_target((12,), 90, torch.float16, device)
    target[2] = -100
    leaf = z.clone().requires_grad_()
    logits = leaf * 1
    storage = logits.data_ptr()
    out = logits_logprob(
        logits, target, return_entropy=True, inplace_backward=True, backend=backend
    )
    version = logits._version
    c, g = upstream(out.logprob.shape, device)
    loss = (out.logprob.double() * c).sum() + (out.entropy.double() * g).sum()
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert gradient.data_ptr() == storage, "the gradient was not written over the logits"
    assert logits._version > version, "whoever saved the logits would not notice the overwriting"
    got = split_columns({"dlogits": gradient}, target)
    _, truth, plain = three(z, target, backend=backend, e=False)
    names = [k for k in truth if k.startswith("dlogits")]
    assert_all_close_as_plain(*({k: x[k] for k in names} for x in (got, truth, plain)))
    with pytest.raises(RuntimeError, match="inplace_backward=False"):
        torch.autograd.grad(loss, logits)
    shared = (leaf[:1] * 1).expand(12, 90)
    with pytest.raises(ValueError, match="share memory"):
        logits_logprob(shared, target, inplace_backward=True, backend=backend)
    with pytest.raises(ValueError, match="leaf"):
        logits_logprob(leaf, target, inplace_backward=True, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_are_never_read(backend, device):
    z, target = logits_and_target((8,), 70, torch.float32, device)
    target[[1, 6]] = -100
    z[[1, 6]] = float("nan")
    for inplace in (False, True):
        leaf = z.clone().requires_grad_()
        out = logits_logprob(
            leaf * 1, target, return_entropy=True, inplace_backward=inplace, backend=backend
        )
        (out.logprob.sum() + out.entropy.sum()).backward()
        for x in (*out, leaf.grad):
            assert torch.isfinite(x).all() and (x[[1, 6]] == 0).all()


def test_input_is_left_alone(device):
    """Trap 39."""
    for backend in ("torch", "triton"):
        if backend == "triton" and not has_triton():
            continue
        z, target = logits_and_target((8,), 70, torch.float32, device)
        leaf = z.clone().requires_grad_()
        logits = leaf * 1
        before, version = logits.detach().clone(), logits._version
        out = logits_logprob(logits, target, return_entropy=True, backend=backend)
        (out.logprob.sum() + out.entropy.sum()).backward(retain_graph=True)
        first = leaf.grad.clone()
        leaf.grad = None
        (out.logprob.sum() + out.entropy.sum()).backward()
        assert torch.equal(first, leaf.grad), "a second backward differs"
        assert torch.equal(logits, before) and logits._version == version


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4, dtype=torch.int64)}, "floating-point"),
        ({"logits": torch.zeros(4, 0)}, "V > 0"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, "logits without its last dimension"),
        ({"target": torch.full((4,), 9)}, "outside the vocabulary"),
        ({"target": torch.full((4,), -1)}, "outside the vocabulary"),
        ({"target": torch.zeros(4)}, "integer token ids"),
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": torch.zeros(4)}, "above 0"),
        ({"temperature": torch.ones(3)}, "one per target"),
        ({"softcap": -1.0}, "above 0"),
        ({"backend": "cuda"}, "one of"),
    ],
    ids=str,
)
def test_rejects(change, message):
    arguments = {"logits": torch.zeros(4, 9), "target": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        logits_logprob(arguments.pop("logits"), arguments.pop("target"), **arguments)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device):
    """Trap 23: offsets are 64-bit."""
    n, vocab = 2**16 + 3, 2**15 + 1
    z = torch.zeros(n, vocab, dtype=torch.bfloat16, device=device)
    target = torch.full((n,), vocab - 1, device=device)
    z[-1, vocab - 1] = 5.0
    z.requires_grad_()
    out = logits_logprob(z * 1, target, inplace_backward=True, backend="triton")
    want = reference.logits_logprob(z[-2:].detach().double(), target[-2:])
    assert torch.allclose(out.logprob[-2:].double(), want.logprob, atol=1e-4)
    out.logprob.sum().backward()
    assert z.grad[-1, vocab - 1].item() == pytest.approx(
        -torch.expm1(want.logprob[-1]).item(), 0.01
    )

"""linear_logprob: values and gradients against float64, in every backend."""

import pytest
import torch

from riskpo_kernels import linear_logprob, reference
from tests.compare import FACTOR, assert_all_close_as_plain, assert_close_as_plain, errors
from tests.conftest import has_triton
from tests.head_inputs import head, run

# the road of large heads; tests/lm_head/test_kept_logits.py has the one of small heads
pytestmark = pytest.mark.usefixtures("recomputed")
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason=""))]
SHAPES = [(64, 512, 32), (37, 613, 24), (1, 7, 1), (50, 1, 8), (23, 40, 130)]


def dtypes(backend, device):
    if backend == "triton" and device.type == "cpu":
        return [torch.float32, torch.float16]  # the interpreter multiplies bf16 wrongly
    wide = [] if backend == "triton" else [torch.float64]
    return [*wide, torch.float32, torch.bfloat16, torch.float16]


def three(h, w, b, target, *, per_row=False, backend, **options):
    """(got, truth, plain) for one configuration."""
    t = torch.linspace(0.4, 1.6, target.numel(), device=h.device).view(target.shape)
    tensors = {"hidden": h, "weight": w, "bias": b}
    exact = {k: None if x is None else x.double() for k, x in tensors.items()}
    temperature = {"temperature": t} if per_row else {}
    return (
        run(linear_logprob, tensors, target, backend=backend, **options, **temperature),
        run(reference.linear_logprob, exact, target, **options, **temperature),
        run(reference.linear_logprob, tensors, target, **options, **temperature),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(backend, shape, device):
    for dtype in dtypes(backend, device):
        h, w, b, target = head(*shape, dtype, device)
        if target.numel() > 3:
            target[3] = -100
        found, factor = three(h, w, b, target, backend=backend, memory_mib=0.25), FACTOR
        if backend == "triton" and dtype == torch.float32 and device.type == "cpu":
            # the interpreter multiplies in one order, the backward in another: at logits of 71, of
            # width 130, dH and dW are up to 36 times as far off as plain PyTorch's
            assert_all_close_as_plain(
                *({k: x[k] for k in ("logprob", "entropy", "lse")} for x in found)
            )
            factor = 40 if shape[2] == 130 else 12
        assert_all_close_as_plain(*found, factor=factor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.3},
        {"scale": 0.5},
        {"softcap": 4.0},
        {"softcap": 50.0, "scale": 2.0},
        {"per_row": True, "softcap": 5.0},
        {"per_row": True},
        {"c": False},
        {"e": False},
        {"g": False, "e": False},
        {"c": False, "g": False},
        {"c": False, "g": False, "softcap": 4.0, "scale": 2.0, "per_row": True},
    ],
    ids=str,
)
def test_options_match_reference(backend, options, device):
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    for kind in (torch.float32, dtype):
        h, w, b, target = head(41, 300, 16, kind, device)
        assert_all_close_as_plain(*three(h, w, b, target, backend=backend, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_error_does_not_grow_with_the_number_of_tiles(backend, device):
    """Traps 7, 8, 27: dW over row chunks and dH over vocabulary stripes are summed in float32."""
    dtype = torch.float16
    # more rows than words, then more words than rows: each order of the loops
    for n, vocab in ((260, 200), (100, 290)):
        h, w, b, target = head(n, vocab, 8, dtype, device)
        for memory_mib in (0.04, 0.3):
            result = three(h, w, b, target, backend=backend, memory_mib=memory_mib)
            assert_all_close_as_plain(*result)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_rows(backend, device):
    """Traps 2, 3, 5: rows near -200 and -1e4, common offsets, p(target) up to 1 - 1e-6."""
    vocab, width = 300, 4
    w = torch.zeros(vocab, width, device=device)
    w[:, 0] = torch.randn(vocab, device=device)
    w[:, 1] = 1.0
    w[7, 2] = 1.0
    h = torch.zeros(12, width, device=device)
    h[:, 0] = 1.0
    h[:6, 1] = torch.tensor([-200.0, -1e4, 1e3, -1e3, 1e4, 0.0])
    # column 2 lifts word 7: p = .9, .99, .999, 1 - 1e-6, about 1 - 1e-9, and 1
    rest = torch.logsumexp(w[:, 0].double()[torch.arange(vocab) != 7], 0)
    for row, p in enumerate((0.9, 0.99, 0.999, 1 - 1e-6, 1 - 1e-9), start=6):
        h[row, 2] = torch.logit(torch.tensor(p, dtype=torch.float64)) + rest - w[7, 0]
    h[11, 2] = 300.0
    target = torch.full((12,), 7, device=device)
    for name, part in (("offset", slice(0, 6)), ("certain", slice(6, 12))):
        got, truth, plain = three(h[part], w, None, target[part], backend=backend)
        assert_all_close_as_plain(got, truth, plain)
        assert (got["logprob"] <= 0).all() and (got["entropy"] >= 0).all(), name
    # one row at a time: a near-one-hot row must be right beside its own small gradient
    for row in range(6, 11):
        part = slice(row, row + 1)
        got, truth, _ = three(h[part], w, None, target[part], backend=backend)
        for name in ("logprob", "entropy", "dhidden"):
            assert errors(got[name], truth[name])[0] < 3e-5, (row, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_like_logits(backend, device):
    """Forbidden words (bias -1e4) keep their zero probability, as targets too."""
    h, w, b, target = head(20, 100, 8, torch.float32, device)
    b[10:60] = -1e4
    target[:5] = 20  # a forbidden word taken all the same: finite, hugely negative
    assert_all_close_as_plain(*three(h, w, b, target, backend=backend))
    b[10:60] = -float("inf")
    target[:5] = 80
    got = run(linear_logprob, {"hidden": h, "weight": w}, target, backend=backend, bias=b)
    want = run(
        reference.linear_logprob,
        {"hidden": h.double(), "weight": w.double()},
        target,
        bias=b.double(),
    )
    for name, x in got.items():
        assert torch.allclose(x.double(), want[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_beyond_its_range(backend, device):
    """Trap 6: fp16 inputs whose logits exceed 65,504."""
    h, w, b, target = head(16, 64, 8, torch.float16, device, bias=False)
    assert_all_close_as_plain(*three(h * 100, w * 100, b, target, backend=backend, scale=2.0))
    assert (h.float() * 100 @ (w.float() * 100).T).abs().max() * 2 > 65504


@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bit_hidden_with_float32_head(backend, device):
    """Trap 17: the float32 master head is not rounded; autocast does not change the op."""
    h, w, b, target = head(20, 90, 16, torch.float32, device)
    h = h.half()
    tensors = {"hidden": h, "weight": w, "bias": b}
    exact = {k: x.double() for k, x in tensors.items()}
    got = run(linear_logprob, tensors, target, backend=backend)
    truth = run(reference.linear_logprob, exact, target)
    plain = run(reference.linear_logprob, tensors, target)
    assert got["dhidden"].dtype == torch.float16 and got["dweight (targets)"].dtype == torch.float32
    assert_all_close_as_plain(got, truth, plain)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = run(linear_logprob, tensors, target, backend=backend)
    for name in got:
        assert torch.equal(inside[name], got[name]), name


def z_loss(op, h, w, target, other, **options):
    """Cross entropy + 1e-2 lse^2, and minus the log-prob of some other token; and its gradients."""
    h, w = (x.detach().clone().requires_grad_() for x in (h, w))
    out = op(h, w, target, **options)
    other_logprob = (h * w[other]).sum(-1) - out.lse
    loss = (1e-2 * out.lse.square() - out.logprob - 0.1 * other_logprob).mean()
    loss.backward()
    return {"other": other_logprob, "dhidden": h.grad, "dweight": w.grad}


@pytest.mark.parametrize("backend", BACKENDS)
def test_z_loss_and_other_tokens(backend, device):
    h, w, _, target = head(41, 300, 16, torch.float32, device, bias=False)
    other = target.roll(1)
    assert_all_close_as_plain(
        z_loss(linear_logprob, h, w, target, other, backend=backend),
        z_loss(reference.linear_logprob, h.double(), w.double(), target, other),
        z_loss(reference.linear_logprob, h, w, target, other),
    )


def test_reference_gradients_by_finite_differences():
    h, w, b, target = head(5, 9, 3, torch.float64, "cpu")
    target[1] = -100
    t = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)

    def f(h, w, b):
        out = reference.linear_logprob(
            h, w, target, bias=b, temperature=t, scale=0.7, softcap=3.0, return_entropy=True
        )
        return out.logprob, out.entropy, out.lse

    tensors = [x.requires_grad_() for x in (h, w, b)]
    assert torch.autograd.gradcheck(f, tensors)


def test_trained_head(shared_data, device):
    """Real rows at three temperatures: logits of bf16 inputs are never rounded to bf16."""
    from safetensors.torch import load_file

    rows = load_file(shared_data / "lm_rows" / "rows.safetensors")
    h, w = rows["hidden"][:96].to(device), rows["weight"].to(device)
    target = torch.multinomial((h.float() @ w.float().T / 0.3).softmax(-1), 1)[:, 0]
    for temperature in (1.0, 0.2):
        options = {"temperature": temperature, "memory_mib": 16, "backend": "torch"}
        got, truth, plain = three(h, w, None, target, **options)
        assert_all_close_as_plain(got, truth, plain)
        assert (got["logprob"].double() - truth["logprob"]).abs().max() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_large_on_gpu(dtype, device):
    h, w, b, target = head(4096, 32003, 256, dtype, device)
    for backend in ("triton", "torch"):
        got, truth, plain = three(h, w, b, target, backend=backend)
        for name in truth:
            assert_close_as_plain(name, got[name], truth[name], plain[name])


@pytest.mark.parametrize("tail_eps", [0.0, 2.0**-14])
@pytest.mark.parametrize(
    ("n", "vocab"), [(67, 1025), pytest.param(2**16 + 3, 2**15 + 1, marks=pytest.mark.gpu)]
)
def test_more_than_two_to_the_31_logits(n, vocab, tail_eps, device):
    """Trap 23: offsets are 64-bit, in rows, columns and pairs. The last ones tell."""
    h, w, _, target = head(n, vocab, 16, torch.bfloat16, device, bias=False)
    h, w = h.requires_grad_(), w.requires_grad_()
    out = linear_logprob(h, w, target, tail_eps=tail_eps)
    out.logprob.sum().backward()
    r, v = slice(n - 40, n), slice(vocab - 100, vocab)
    want = reference.linear_logprob(h[r].detach().double(), w.detach().double(), target[r])
    assert (out.logprob[r] - want.logprob).abs().max() < 1e-4
    dz = -torch.exp(h[r].double() @ w.double().T - want.lse[:, None])
    dz[torch.arange(40, device=device), target[r]] += 1
    assert errors(h.grad[r], dz @ w.double())[0] < 0.01
    p = torch.exp(h.double() @ w[v].double().T - out.lse[:, None].double())
    taken = (target[:, None] == torch.arange(v.start, v.stop, device=device)).double()
    assert errors(w.grad[v], (taken - p).T @ h.double())[0] < 0.01


@pytest.mark.parametrize(
    ("vocab", "width"), [(1025, 48), pytest.param(2**17 + 1, 2**14 + 16, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("tail_eps", [0.0, 2.0**-14])
def test_a_head_of_more_than_two_to_the_31_weights(vocab, width, tail_eps, device):
    """Trap 23 once more: the last rows of the head, and what they give to dH."""
    w = torch.randn(vocab, width, dtype=torch.bfloat16, device=device)
    target = torch.arange(64, device=device) + vocab - 64
    h = (w[target].float() * 8 / width + 0.01 * torch.randn(64, width, device=device)).bfloat16()
    h, w = h.requires_grad_(), w.requires_grad_()
    out = linear_logprob(h, w, target, tail_eps=tail_eps)
    out.logprob.sum().backward()
    with torch.no_grad():
        log_p = (h.float() @ w.float().T).log_softmax(1)
        rows = torch.arange(64, device=device)
        assert (out.logprob - log_p[rows, target]).abs().max() < 1e-3
        dz = -log_p.exp()
        dz[rows, target] += 1
        assert errors(h.grad, dz @ w.float())[0] < 0.02
        assert errors(w.grad[-64:], dz[:, -64:].T @ h.float())[0] < 0.02

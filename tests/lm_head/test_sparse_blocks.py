"""The sparse backward: what may be dropped, what it costs in accuracy, and that nothing else is."""

import math

import pytest
import torch

from riskpo_kernels import linear_logprob, reference
from riskpo_kernels.core import softmax
from riskpo_kernels.core.softmax import BLOCK, LogitMap, RowState, finish, fold, n_blocks, select
from tests.compare import assert_all_close_as_plain, errors
from tests.conftest import has_triton
from tests.head_inputs import head, run, split_columns

# the road of large heads; tests/lm_head/test_kept_logits.py has the one of small heads
pytestmark = pytest.mark.usefixtures("recomputed")


def peaked(n, vocab, width, seed=0):
    """Rows as under RL, from uncertain to almost certain; words in order of frequency."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(vocab, width, generator=g) / width**0.5
    likely = torch.randint(vocab, (n,), generator=g)
    lean = torch.linspace(2, 14, n)[torch.randperm(n, generator=g)] / w[likely].norm(dim=1) ** 2
    h = torch.randn(n, width, generator=g) * 0.5 + lean[:, None] * w[likely]
    h[:, 0], w[:, 0] = 1.0, -2.5 * torch.log(torch.arange(1.0, vocab + 1))  # rare words come last
    target = torch.multinomial((h @ w.T).softmax(-1), 1, generator=g)[:, 0]
    return h, w, target


def selection(logits, target, eps, entropy):
    """(keep [R, B], p [R, V] in float64) of rows of logits."""
    n, vocab = logits.shape
    state = RowState.new(n, True, logits, torch.float32)
    blocks = torch.empty(n, n_blocks(vocab))
    fold(logits.float().clone(), target, None, state, LogitMap(1.0, None, 1.0), blocks)
    keep = select(blocks, target, finish(state), eps, entropy)
    return keep, logits.double().softmax(-1)


def rows_of_every_kind():
    h, w, target = peaked(24, 5000, 64)
    yield "peaked", h @ w.T, target
    yield "flat", torch.zeros(4, 1000), torch.tensor([0, 1, 998, 999])
    sharp = torch.randn(6, 1000)
    sharp[:, 7] = torch.tensor([5.0, 8.0, 12.0, 16.0, 20.0, 40.0])
    yield "near one-hot", sharp, torch.full((6,), 7)
    # every block but the target's just under the threshold: only the cap saves this row
    vocab, eps = 151_936, 2.0**-14
    even = torch.full((3, vocab), math.log(0.9 * eps / BLOCK))
    even[:, 5] = math.log(1 - 0.9 * eps * (n_blocks(vocab) - 1))
    yield "evenly under the threshold", even, torch.tensor([5, 5, 70_000])


@pytest.mark.parametrize("entropy", [False, True])
def test_dropped_gradient_is_bounded_in_every_row(entropy):
    """||dropped dz||_1 <= 32 eps (|c| + |g|), and <= 256 eps ||dz||_1 for the log-prob alone."""
    for eps in (2.0**-14, 2.0**-10):
        for name, logits, target in rows_of_every_kind():
            keep, p = selection(logits, target, eps, entropy)
            n, vocab = p.shape
            dropped = ~keep.repeat_interleave(BLOCK, 1)[:, :vocab]
            taken = torch.zeros_like(dropped).scatter_(1, target[:, None], True)
            assert not (dropped & taken).any(), "the target's own column was dropped"
            log_p = p.clamp(min=1e-300).log()
            h = -(p * log_p).sum(1, keepdim=True)
            dz_c = taken.double() - p
            dz_g = -p * (log_p + h)
            slack = 1 + 1e-4  # the selection sees float32 sums
            lost_c = (dz_c.abs() * dropped).sum(1)
            assert (lost_c <= 32 * eps * slack).all(), (name, lost_c.max())
            assert (lost_c <= 256 * eps * dz_c.abs().sum(1).clamp(min=2.0**-15) * slack).all(), name
            if entropy:
                both = (dz_c.abs() + dz_g.abs()) * dropped
                assert (both.sum(1) <= 2 * 16 * eps * slack).all(), name
            if name == "peaked":
                assert keep.float().mean() < 0.9, "nothing is dropped: the test shows nothing"
            if name == "evenly under the threshold":
                assert keep[0].float().mean() > 0.5, "7 % of the mass would be lost"


@pytest.fixture
def always_sparse(monkeypatch):
    monkeypatch.setattr(softmax, "DENSE_SHARE", {"cuda": 2.0, "cpu": 2.0})


BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason=""))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 5.0, "scale": 1.5},
        {"temperature": 0.7, "memory_mib": 0.1},
        {"ignore": True, "per_row": True},
        {"softcap": 5.0, "per_row": True},
        {"deterministic": True, "c": False},
        {"g": False},
    ],
    ids=str,
)
def test_all_blocks_active_is_exact(always_sparse, options, backend, device):
    """With a threshold that drops nothing the sparse backward is the dense one, to rounding."""
    options = dict(options)
    sixteen = torch.float16 if backend == "triton" and device.type == "cpu" else torch.bfloat16
    for n, vocab in ((60, 300), (300, 129), (20, 128)):  # fewer rows than words, and more
        for dtype in (torch.float32, sixteen):
            h, w, b, target = head(n, vocab, 12, dtype, device)
            if options.get("ignore"):
                target[::3] = -100
            more = {k: v for k, v in options.items() if k not in ("ignore", "per_row")}
            if options.get("per_row"):
                more["temperature"] = torch.linspace(0.5, 1.5, n, device=device)
            tensors = {"hidden": h, "weight": w, "bias": b}
            exact = {k: x.double() for k, x in tensors.items()}
            assert_all_close_as_plain(
                run(linear_logprob, tensors, target, tail_eps=1e-30, backend=backend, **more),
                run(reference.linear_logprob, exact, target, **more),
                run(reference.linear_logprob, tensors, target, **more),
                factor=5,  # float32 logits of gathered rows come from a product of another shape
            )


@pytest.mark.skipif(not has_triton(), reason="")
def test_both_backends_choose_the_same_blocks(device):
    """Real dropping: the kernels' block sums lead to the choice of the PyTorch formulas."""
    h, w, target = (x.to(device) for x in peaked(70, 1500, 64))
    grads = []
    for backend in ("torch", "triton"):
        hh, ww = h.clone().requires_grad_(), w.clone().requires_grad_()
        out = linear_logprob(hh, ww, target, tail_eps=2.0**-10, backend=backend)
        (out.logprob * torch.linspace(-1, 1, 70, device=device)).sum().backward()
        grads.append((hh.grad, ww.grad))
    exact = w.clone().requires_grad_()
    out = linear_logprob(h, exact, target, tail_eps=0.0)
    (out.logprob * torch.linspace(-1, 1, 70, device=device)).sum().backward()
    assert errors(grads[1][0], grads[0][0])[0] < 1e-6
    assert errors(grads[1][1], grads[0][1])[0] < 1e-6
    assert torch.equal(grads[0][1] == 0, grads[1][1] == 0), "other rows of the head were dropped"
    assert errors(grads[0][1], exact.grad)[0] > 1e-6, "nothing was dropped"


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, device):
    """Column-major and sliced hidden states and weights give the gradients of contiguous ones."""
    h, w, target = (x.to(device) for x in peaked(40, 700, 64))
    grads = []
    for layout in (
        lambda x: x,
        lambda x: x.T.contiguous().T,
        lambda x: torch.stack([x, x], -1).flatten(-2)[:, ::2],
    ):
        hh, ww = h.clone().requires_grad_(), w.clone().requires_grad_()
        a, b = layout(hh), layout(ww)
        out = linear_logprob(a, b, target, tail_eps=2.0**-14, backend=backend)
        out.logprob.sum().backward()
        grads.append((hh.grad, ww.grad))
    for dh, dw in grads[1:]:
        assert errors(dh, grads[0][0])[0] < 1e-5 and errors(dw, grads[0][1])[0] < 1e-5


def test_no_row_with_a_coefficient_in_half_precision():
    """fp16 on a tensor core divides by the largest coefficient: there may be none."""
    from riskpo_kernels.core.gradient import RowGradient
    from riskpo_kernels.core.matmul import Products
    from riskpo_kernels.lm_head import backward as head_backward

    products = Products(torch.device("cpu"), torch.float16, torch.float16)
    products.mixed, products.dtype = True, torch.float16
    empty = torch.empty(0)
    up = RowGradient(empty, empty, None, empty, empty)
    assert head_backward._unit(up, products) is None
    some = torch.tensor([0.0, -3e-6])
    up = RowGradient(some / 2, some, None, some, some)
    assert head_backward._unit(up, products).item() == pytest.approx(3e-6)


def test_frozen_sides(always_sparse):
    h, w, b, target = head(30, 300, 8, torch.float32, "cpu")
    both_h, both_w = h.clone().requires_grad_(), w.clone().requires_grad_()
    linear_logprob(both_h, both_w, target, tail_eps=1e-30).logprob.sum().backward()
    only_h, only_w = h.clone().requires_grad_(), w.clone().requires_grad_()
    linear_logprob(only_h, w, target, tail_eps=1e-30).logprob.sum().backward()
    linear_logprob(h, only_w, target, tail_eps=1e-30).logprob.sum().backward()
    assert torch.allclose(only_h.grad, both_h.grad, atol=1e-6)
    assert torch.allclose(only_w.grad, both_w.grad, atol=1e-6)


def test_the_way_is_chosen_by_chunk_or_by_row():
    """By the mean share of the rows that are recorded together; with by_row each for itself."""
    share = softmax.DENSE_SHARE["cpu"]
    keep = torch.zeros(6, 100, dtype=torch.bool)
    for row, n in enumerate((100, 100, 55, 100, 5, 5)):
        keep[row, :n] = True
    assert 0.7 < share < 0.85, "the rows below were made for it"
    for by_row, want in ((False, [1, 1, 1, 0, 0, 0]), (True, [1, 1, 0, 1, 0, 0])):
        active = softmax.ActiveBlocks.new(100 * BLOCK, 6, keep.device)
        for chunk in (slice(0, 3), slice(3, 6)):
            active.record(chunk, keep[chunk], by_row)
        assert active.dense.tolist() == [bool(x) for x in want]
        assert active.pairs.tolist() == keep.sum(1).tolist()


def test_dense_and_sparse_rows_in_one_batch():
    """Flat rows among peaked ones: with deterministic=True each row chooses for itself, and the
    choice does not change with its company."""
    h, w, target = peaked(40, 4000, 64)
    h[::4] = 0.01  # flat
    results = {}
    for tail_eps in (0.0, 2.0**-16):
        hh, ww = h.clone().requires_grad_(), w.clone().requires_grad_()
        out = linear_logprob(hh, ww, target, tail_eps=tail_eps, deterministic=True)
        (out.logprob * torch.linspace(-1, 1, 40)).sum().backward()
        results[tail_eps] = hh.grad, ww.grad
    for sparse, exact in zip(results[2.0**-16], results[0.0], strict=True):
        assert 0 < errors(sparse, exact)[0] < 1e-3
    flat, exact = (results[e][0][::4] for e in (2.0**-16, 0.0))
    assert errors(flat, exact)[0] < 1e-6, "a flat row was not computed densely"


@pytest.mark.parametrize("g", [0.0, 1.0])
@pytest.mark.parametrize(
    ("temperature", "softcap"),
    [(1.0, None), (0.5, None), (0.3, None), (0.2, None), (0.15, None), (0.3, 15.0), (0.2, 6.0)],
)
def test_default_threshold_stays_inside_the_rule(shared_data, temperature, softcap, g):
    """A trained head in bf16 at the default tail_eps, RiskPO-like coefficients, without and with
    an entropy gradient: the one rule in both its metrics, dW apart for the rows of targets."""
    from safetensors.torch import load_file

    rows = load_file(shared_data / "lm_rows" / "rows.safetensors")
    h, w = rows["hidden"][::8], rows["weight"]
    z = h.float() @ w.float().T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    target = torch.multinomial((z / temperature).softmax(-1), 1)[:, 0]
    c = -torch.rand(16).repeat_interleave(16)  # one sign, constant within a sequence

    def results(op, dtype, **options):
        hh, ww = (x.detach().clone().to(dtype).requires_grad_() for x in (h, w))
        options |= {"temperature": temperature, "softcap": softcap, "return_entropy": g != 0}
        out = op(hh, ww, target, **options)
        values = {"logprob": out.logprob} | ({"entropy": out.entropy} if g else {})
        total = (out.logprob * c.to(out.logprob.dtype)).sum()
        (total + (g * out.entropy.sum() if g else 0)).backward()
        return split_columns(values | {"dhidden": hh.grad, "dweight": ww.grad}, target)

    truth = results(reference.linear_logprob, torch.float64)
    plain = results(reference.linear_logprob, torch.bfloat16)
    got = results(linear_logprob, torch.bfloat16, backend="torch")
    assert_all_close_as_plain(got, truth, plain)
    if temperature < 0.6:
        exact = results(linear_logprob, torch.bfloat16, backend="torch", tail_eps=0.0)
        assert not torch.equal(got["dhidden"], exact["dhidden"]), "nothing was dropped"


def test_adam_with_dropped_tails_learns_the_same():
    """Twenty Adam steps, sparse beside exact: the head rows of targets move alike and the policy
    is the same. Rows that are never a target get a gradient near the rounding of the others', and
    Adam divides by its size: exact, they move by the learning rate; dropped, they stand still."""
    h, w, target = peaked(64, 3000, 64)
    advantage, steps, rate = torch.randn(64), 20, 1e-3
    moved = {}
    for tail_eps in (0.0, 2.0**-14):
        weight = w.clone().requires_grad_()
        adam = torch.optim.Adam([weight], lr=rate)
        for _ in range(steps):
            adam.zero_grad()
            out = linear_logprob(h, weight, target, tail_eps=tail_eps)
            (out.logprob * advantage).mean().backward()
            adam.step()
        moved[tail_eps] = weight.detach() - w
    exact, sparse = moved[0.0], moved[2.0**-14]
    taken = torch.zeros(3000, dtype=torch.bool)
    taken[target] = True
    assert (sparse - exact)[taken].norm() / exact[taken].norm() < 1e-3
    before, a, b = (linear_logprob(h, w + x, target).logprob for x in (0.0, exact, sparse))
    assert (a - b).abs().max() < 1e-3 * (a - before).abs().max()

    full, rarely = (x[~taken].norm(dim=1) for x in (exact, sparse))  # of each row never taken
    still = rarely == 0
    print(
        f"rows never taken: {still.float().mean():.3f} stand still; norm of a row's update "
        f"{full.mean():.4f} exact, {rarely.mean():.4f} sparse (median {full.median():.4f}, "
        f"{rarely.median():.4f}), of those that stand still {full[still].mean():.4f} exact; "
        f"log-probs moved {(a - before).abs().max():.2f}, differ {(a - b).abs().max():.1e}"
    )
    assert (full > 0).all(), "the exact update reaches every row"
    assert 0.2 < still.float().mean() < 0.5
    assert rarely.max() < 1.01 * full.max() < 1.2 * rate * steps * h.shape[1] ** 0.5
    assert 0.3 < rarely.mean() / full.mean() < 0.7

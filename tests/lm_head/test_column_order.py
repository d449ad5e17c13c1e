"""Columns in an order of their own: the same gradients, in fewer blocks."""

import pytest
import torch

from riskpo_kernels import linear_logprob, reference
from riskpo_kernels.core import column_order, softmax
from riskpo_kernels.core.matmul import Options, counting
from riskpo_kernels.lm_head import operator
from tests.compare import assert_all_close_as_plain
from tests.head_inputs import head, run

EPS = 2.0**-14


@pytest.fixture
def ordered(monkeypatch):
    """Small heads are ordered too; the orders that were found."""
    found, common_order = [], column_order.common_order

    def order(p):
        found.append(common_order(p))
        return found[-1]

    monkeypatch.setattr(operator, "ORDERED", 0)
    monkeypatch.setattr(column_order, "PAYS", -1)
    monkeypatch.setattr(column_order, "common_order", order)
    return found


CASES = {
    "plain": {},
    "softcap, rows' temperatures, ignored": {"softcap": 5.0, "scale": 1.5, "per_row": True},
    "pieces of rows": {"memory_mib": 0.1},
    "the dense way": {"dense": True},
    "no bias, one gradient": {"c": False, "bias": False},
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_reference(
    case, dtype, recompute, ordered, monkeypatch, request
):
    """With a threshold that drops nothing."""
    options = dict(CASES[case])
    if recompute:
        request.getfixturevalue("recomputed")
    share = -1.0 if options.pop("dense", False) else 2.0
    monkeypatch.setitem(softmax.DENSE_SHARE, "cpu", share)
    n, vocab = (450, 300) if "memory_mib" in options else (61, 700)
    h, w, b, target = head(n, vocab, 32, dtype, "cpu", bias=options.pop("bias", True))
    target[::7] = -100
    if options.pop("per_row", False):
        options["temperature"] = torch.linspace(0.5, 1.5, n)
    tensors = {"hidden": h, "weight": w, "bias": b}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    exact = {name: x.double() for name, x in tensors.items()}
    more = {name: x for name, x in options.items() if name != "memory_mib"}
    assert_all_close_as_plain(
        run(linear_logprob, tensors, target, tail_eps=1e-30, backend="torch", **options),
        run(reference.linear_logprob, exact, target, **more),
        run(reference.linear_logprob, tensors, target, **more),
        factor=5,  # float32 logits of gathered rows come from a product of another shape
    )
    assert [x.sort().values.tolist() for x in ordered] == [list(range(vocab))]
    assert not torch.equal(ordered[0], torch.arange(vocab))


def contexts(n=256, vocab=4096, width=64):
    """Rows of eight contexts. Each likes 128 words, four in every block of 128."""
    g = torch.Generator().manual_seed(0)
    h = 14 * torch.eye(8, width).repeat(n // 8, 1)
    h[:, 8:] = 0.2 * torch.randn(n, width - 8, generator=g)
    w = torch.randn(vocab, width, generator=g)
    w[:, :8] = -1.0
    likes = torch.arange(vocab) % 32
    w[likes < 8, likes[likes < 8]] = 0.0
    return h, w, (h @ w.T).softmax(-1).multinomial(1, generator=g)[:, 0]


def gradients(h, w, target, **options):
    h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
    with counting() as work:
        out = linear_logprob(h, w, target, backend="torch", **options).logprob
        out.backward(torch.linspace(-1, 1, len(out)))
    return h.grad, w.grad, 2 * work.multiply_adds / (h.shape[0] * w.numel())


def test_rows_of_few_contexts_need_fewer_blocks(monkeypatch, recomputed):
    h, w, target = contexts()
    by_id = gradients(h, w, target, tail_eps=EPS)
    exact = gradients(h, w, target, tail_eps=0.0)
    monkeypatch.setattr(operator, "ORDERED", 0)
    monkeypatch.setattr(column_order, "PAYS", 0)
    own = gradients(h, w, target, tail_eps=EPS)
    assert own[2] - 2 < 0.7 * (by_id[2] - 2), (own[2], by_id[2])
    # of each row 32 eps |c| of dz at most is dropped
    lost = (own[0] - exact[0]).norm(dim=1)
    most = 32 * EPS * torch.linspace(-1, 1, len(h)).abs() * w.norm(dim=1).max()
    assert (lost <= most + 1e-5).all() and lost.max() > 1e-5, "nothing was dropped"


def test_there_is_an_order_only_where_it_pays(monkeypatch):
    """Not for few rows or sharp ones, nor where a row may not feel its company."""

    def columns(h, w, target, deterministic=False, keep=True, eps=EPS):
        o = Options(1.0, None, 1.0, False, "torch", 300.0, eps, deterministic, keep, -100)
        return operator.head_operator(h, w, None, target, None, o)[-2]

    h, w, target = contexts()
    assert columns(h, w, target).numel() == 0  # too small a head
    monkeypatch.setattr(operator, "ORDERED", len(w))
    assert columns(h, w, target).sort().values.tolist() == list(range(len(w)))
    assert columns(h[:150], w, target[:150]).eq(-1).all()
    assert columns(h, 4 * w, target).eq(-1).all()
    for more in ({"deterministic": True}, {"keep": False}, {"eps": 0.0}):
        assert columns(h, w, target, **more).numel() == 0, more


def test_blocks_of_no_row_get_zeros(monkeypatch):
    """dW is not cleared before blocks are written to it."""
    h, w, target = contexts()
    order = (torch.arange(len(w)) % 32).argsort(stable=True)  # liked words first
    expected = gradients(h, w, target, tail_eps=EPS)[1][order]
    real = torch.empty

    def poisoned(*sizes, **more):
        x = real(*sizes, **more)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    _, dw, units = gradients(h, w[order], order.argsort()[target], tail_eps=EPS)
    assert units < 3 and torch.isfinite(dw).all() and (dw[1024:] == 0).all()
    assert torch.allclose(dw[:1024], expected[:1024], atol=1e-3)

"""Logits kept between the passes: the same gradients for less work, within their share."""

import pytest
import torch

from riskpo_kernels import linear_logprob, reference
from riskpo_kernels.core import softmax
from riskpo_kernels.core.matmul import Options, counting
from riskpo_kernels.lm_head.operator import head_operator
from tests.compare import assert_all_close_as_plain
from tests.conftest import has_triton
from tests.head_inputs import head, run

N, V, D = 41, 700, 24
KEPT = {"all": V, "some": 384, "none": 0}


@pytest.fixture
def keep(monkeypatch):
    """keep(columns, memory_mib): that many columns of N rows fit in their share of memory_mib."""

    def set_share(columns, memory_mib=300.0):
        room = (columns + 1) * N * 4
        monkeypatch.setattr(softmax, "SHARE", memory_mib * 2**20 / room)

    return set_share


def kept_of(h, w, target, *, memory_mib=300.0, deterministic=False, backend="torch", keep=True):
    o = Options(1.0, None, 1.0, False, backend, memory_mib, 0.0, deterministic, keep, -100)
    return head_operator(h, w, None, target, None, o)[-1]


@pytest.mark.parametrize("way", ["dense", "sparse"])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 6.0, "scale": 1.5, "per_row": True}, {"c": False}], ids=str
)
def test_gradients_are_those_of_the_reference(way, kept, dtype, options, keep, monkeypatch):
    """A tile that is kept in part, an ignored row, every option of a row."""
    h, w, b, target = head(N, V, D, dtype, "cpu")
    target[3] = -100
    options = dict(options)
    if options.pop("per_row", False):
        options["temperature"] = torch.linspace(0.4, 1.6, N)
    tensors = {"hidden": h, "weight": w, "bias": b}
    exact = {k: x.double() for k, x in tensors.items()}
    truth = run(reference.linear_logprob, exact, target, **options)
    plain = run(reference.linear_logprob, tensors, target, **options)
    eps = 0.0
    if way == "sparse":  # nothing is dropped, but blocks are visited one by one
        monkeypatch.setitem(softmax.DENSE_SHARE, "cpu", 1.1)
        eps = 1e-30
    keep(KEPT[kept] if kept != "all" else 6 * 128)
    with counting() as work:
        got = run(linear_logprob, tensors, target, tail_eps=eps, backend="torch", **options)
    assert_all_close_as_plain(got, truth, plain)
    if way == "dense":
        assert 2 * work.multiply_adds / ((N - 1) * V * D) == pytest.approx(8 - 2 * KEPT[kept] / V)


def test_small_tiles_meet_the_end_of_what_is_kept(keep):
    """memory_mib halves the tile until the last kept column lies inside one."""
    keep(384, memory_mib=0.2)
    h, w, _, target = head(N, V, D, torch.float32, "cpu", bias=False)
    assert kept_of(h, w, target, memory_mib=0.2).shape == (N, 384)
    tensors = {"hidden": h, "weight": w}
    exact = {k: x.double() for k, x in tensors.items()}
    assert_all_close_as_plain(
        run(linear_logprob, tensors, target, memory_mib=0.2, backend="torch"),
        run(reference.linear_logprob, exact, target),
        run(reference.linear_logprob, tensors, target),
    )


def test_a_second_backward_finds_them_unchanged():
    h, w, _, target = head(N, V, D, torch.float32, "cpu", bias=False)
    w.requires_grad_()
    total = linear_logprob(h, w, target, backend="torch").logprob.sum()
    first = torch.autograd.grad(total, w, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, w)[0])


def test_what_is_kept_stays_within_its_share():
    """Whole blocks, nothing at all for many rows, everything of a small head."""
    for rows, vocab in ((1, 151_936), (1024, 16_384), (4096, 50_000), (2**17, 8192), (0, 10)):
        columns = softmax.kept_columns(rows, vocab, 4, 300)
        assert columns * rows * 4 <= 300 * 2**20 / softmax.SHARE
        assert columns == vocab or columns % softmax.BLOCK == 0
    assert softmax.kept_columns(2**17, 8192, 4, 300) == 0
    assert softmax.kept_columns(512, 1000, 4, 300) == 1000


def test_nothing_is_kept_where_it_may_not_be():
    """Without a backward to come; with deterministic=True, whose rows may not feel their company;
    by the kernels, which recompute as fast as they load."""
    h, w, _, target = head(N, V, D, torch.float32, "cpu", bias=False)
    assert kept_of(h, w, target).shape == (N, V)
    assert kept_of(h, w, target, keep=False).numel() == 0
    assert kept_of(h, w, target, deterministic=True).numel() == 0
    if has_triton():
        assert kept_of(h, w, target, backend="triton").numel() == 0
    leaf = w.clone().requires_grad_()
    for no_grad, expected in ((False, N * V * 4), (True, 0)):
        with torch.set_grad_enabled(not no_grad):
            out = linear_logprob(h, leaf, target, backend="torch").logprob
        node = None if no_grad else out.grad_fn
        while node is not None and not hasattr(node, "saved_tensors"):  # a view, then the op
            node = next(n for n, _ in node.next_functions if n is not None)
        saved = [] if node is None else node.saved_tensors[-1:]
        assert sum(x.nbytes for x in saved) == expected

"""The kernels of a sampler's support: pairs (row, id) against float64, programs in any order."""

import pytest
import torch

from riskpo_kernels import linear_logprob
from riskpo_kernels.core.matmul import counting
from tests.compare import assert_all_close_as_plain
from tests.conftest import has_triton
from tests.head_inputs import head
from tests.lm_head.test_few_columns import three

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="needs triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="shown in the interpreter"),
]
N, V, D = 12, 37, 20
ALL = {"softcap": 5.0, "scale": -1.3, "temperature": torch.linspace(0.4, 1.5, N)}


@pytest.fixture
def small(monkeypatch):
    """Several runs of columns and of a row's pairs in small inputs."""
    from riskpo_kernels.kernels import support_gradient, support_pairs

    for module in (support_pairs, support_gradient):
        monkeypatch.setattr(module, "BD", 16)
    monkeypatch.setattr(support_pairs, "RUN", 16)
    monkeypatch.setattr(support_gradient, "MANY", 64)


def inputs(dtype, *, padded=False):
    """Ids (most of them in many rows) and targets: two rows are ignored, with NaN in them, one
    without an id; one has its target alone, one a target outside, one most ids. Some nobody has."""
    h, w, b, target = head(N, V, D, dtype, "cpu")
    target[[3, 10]] = -100
    h[[3, 10]] = torch.nan
    g = torch.Generator().manual_seed(5)
    lists = [torch.randperm(V - 8, generator=g)[: 1 + 5 * i % 23] for i in range(N)]
    for i, t in enumerate(target.tolist()):
        lists[i] = torch.cat([lists[i][lists[i] != t], torch.tensor([max(t, 0)])]).unique()
        lists[i] = lists[i][torch.randperm(len(lists[i]), generator=g)]
    lists[3], lists[5], lists[6] = lists[3][:0], target[5:6], torch.randperm(V - 8, generator=g)
    lists[11] = lists[11][lists[11] != target[11]]
    counts = torch.tensor([len(x) for x in lists])
    support = torch.cat(lists), torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    if padded:
        support = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1)
        support = support.roll(3, 1).int()
    return h, w, b, target, support


@pytest.mark.parametrize("dtype, options", [(torch.float32, ALL), (torch.float16, {})])
def test_support(dtype, options, small, shuffled):
    """Results and gradients, of lists (float32) and of padded ids; nothing is read or written
    beside. One product of all pairs forward, which the backward does not repeat; one for each
    gradient."""
    *tensors, support = inputs(dtype, padded=dtype == torch.float16)
    options = options | {"support": support, "outside_support": "-inf"}
    with counting() as work:
        got, exact, plain = three(*tensors, own={"backend": "triton"}, **options)
    pairs = (support if dtype == torch.float16 else support[0]).numel()
    assert work.multiply_adds == 3 * pairs * D + pairs
    assert got["logprob"].isneginf().nonzero().flatten().tolist() == [11]
    for x in (got, exact, plain):
        x["logprob"] = x["logprob"].masked_fill(x["logprob"].isneginf(), 0.0)
    assert_all_close_as_plain(got, exact, plain)
    for name in ("logprob", "entropy", "lse", "dhidden"):
        assert not got[name][[3, 10]].any()


def test_512_ids_in_a_row():
    """The launches as they are: one id, 512, and 130; a strided hidden and a frozen head."""
    h, w, _, target = head(3, 600, 8, torch.float32, "cpu", bias=False)
    lists = [
        torch.arange(600).roll(-int(t))[:k] for t, k in zip(target, (1, 512, 130), strict=True)
    ]
    support = torch.cat(lists), torch.tensor([0, 1, 513, 643])
    strided = torch.zeros(3, 16)[:, ::2].copy_(h)
    found = []
    for dtype, backend, x in (
        (torch.float32, "triton", strided),
        (torch.float64, "reference", h),
        (torch.float32, "reference", h),
    ):
        x = x.to(dtype).detach().requires_grad_()
        out = linear_logprob(x, w.to(dtype), target, support=support, backend=backend)
        (out.logprob.double() * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
        found.append({"logprob": out.logprob, "dhidden": x.grad})
    assert_all_close_as_plain(*found)


def test_bits_do_not_depend_on_order_or_company(small, shuffled):
    """The programs' order is another each time; every second row is taken alone."""
    h, w, b, target, (ids, offsets) = inputs(torch.float32)
    c = torch.linspace(-1, 2, N)
    lists = [ids[a:z] for a, z in zip(offsets[:-1], offsets[1:], strict=True)]

    def taken(rows):
        x, y = h[rows].clone().requires_grad_(), w.clone().requires_grad_()
        first = torch.tensor([0] + [len(i) for i in lists[rows]]).cumsum(0)
        own = {"outside_support": "-inf", "return_entropy": True, "backend": "triton"}
        support = torch.cat(lists[rows]), first
        out = linear_logprob(x, y, target[rows], bias=b, support=support, **own)
        ((out.entropy + out.lse) * c[rows]).sum().backward()
        return *out, x.grad, y.grad

    whole, again, half = (taken(slice(None, None, step)) for step in (1, 1, 2))
    assert all(map(torch.equal, whole, again))
    assert all(torch.equal(x[::2], y) for x, y in zip(whole[:4], half[:4], strict=True))
    assert not torch.equal(whole[4], half[4])


def test_no_rows_and_nothing_kept():
    """Sizes of 0 launch nothing."""
    h, w, b, target = head(2, 7, 4, torch.float32, "cpu")
    nothing = torch.empty(0, dtype=torch.int64)
    for rows in (0, 2):
        x = h[:rows].requires_grad_()
        offsets = torch.zeros(rows + 1, dtype=torch.int64)
        ignored = torch.full_like(target[:rows], -100)
        out = linear_logprob(x, w, ignored, bias=b, support=(nothing, offsets), backend="triton")
        (out.logprob.sum() + out.lse.sum()).backward()
        assert not out.logprob.any() and out.logprob.shape == (rows,) and not x.grad.any()

"""The forward as one kernel, statistics in its epilogue: against float64 and the other forward."""

import contextlib

import pytest
import torch

from riskpo_kernels import linear_logprob
from riskpo_kernels.lm_head.tiles import FORWARD
from tests.compare import assert_all_close_as_plain
from tests.conftest import has_triton, skip_if_numpy_feels_a_rows_place
from tests.head_inputs import head
from tests.test_linear_logprob import three

pytestmark = pytest.mark.skipif(not has_triton(), reason="needs triton")
SHAPES = [(64, 512, 32), (37, 1613, 24), (1, 7, 1), (130, 300, 72), (300, 2200, 40)]


@contextlib.contextmanager
def forward(way):
    token = FORWARD.set(way)
    try:
        yield
    finally:
        FORWARD.reset(token)


@pytest.mark.parametrize("way", ["gemm", "gemm, warp-specialised"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(way, shape, device):
    """Ragged rows, columns and depth; widths of 24 and 1 cannot be read through a tensor map."""
    kinds = [torch.float32, torch.float16] if device.type == "cpu" else [torch.bfloat16]
    for dtype in kinds:
        h, w, b, target = head(*shape, dtype, device)
        if target.numel() > 3:
            target[3] = -100
        with forward(way):
            result = three(h, w, b, target, backend="triton", memory_mib=0.6)
        if dtype == torch.float32:  # the backward's logits are summed in another order
            result = [{k: x[k] for k in ("logprob", "entropy", "lse")} for x in result]
        assert_all_close_as_plain(*result)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.3}, {"softcap": 4.0, "scale": 0.5}, {"per_row": True, "softcap": 6.0}],
    ids=str,
)
def test_options(options, device):
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    h, w, b, target = head(41, 1300, 16, dtype, device)
    with forward("gemm"):
        assert_all_close_as_plain(*three(h, w, b, target, backend="triton", **options))


def statistics_both_ways(h, w, b, target, **options):
    results = []
    for way in ("tiles", "gemm"):
        with forward(way), torch.no_grad():
            out = linear_logprob(
                h, w, target, bias=b, return_entropy=True, backend="triton", **options
            )
        results.append(out)
    return results


def test_certain_rows_and_forbidden_words(device):
    """A one-hot row, logits of -inf and -1e4, an id outside the vocabulary."""
    h, w, b, target = head(20, 1500, 8, torch.float16, device)
    b[10:60], b[200:1100] = -1e4, -torch.inf  # a whole job of 1024 columns, nearly
    h[3] = 0.0
    b[target[3]] = 300.0
    target[5] = 210
    tiles, gemm = statistics_both_ways(h, w, b, target, ignore_index=None)
    for x, y in zip(tiles, gemm, strict=True):
        assert torch.equal(x.isfinite(), y.isfinite())
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-5)
    assert gemm.logprob[3] > -1e-6 and gemm.logprob[5] == -torch.inf
    target[7] = 1500
    assert statistics_both_ways(h, w, b, target, ignore_index=None)[1].logprob[7] == -torch.inf


def test_a_row_does_not_depend_on_its_company(device):
    """The order of a row's sums is a function of the vocabulary alone."""
    skip_if_numpy_feels_a_rows_place(device)
    h, w, b, target = head(300, 2200, 24, torch.float16, device)
    with forward("gemm"), torch.no_grad():
        options = dict(bias=b, return_entropy=True, backend="triton", ignore_index=None)
        many = linear_logprob(h, w, target, **options)
        few = linear_logprob(h[250:255], w, target[250:255], **options)
    for x, y in zip(many, few, strict=True):
        assert torch.equal(x[250:255], y)


def test_blocks_are_those_of_the_other_forward(device):
    """Both forwards lead to the same active blocks, so to the same zeros in dW."""
    from tests.lm_head.test_sparse_blocks import peaked

    h, w, target = (x.to(device) for x in peaked(70, 1500, 64))
    h, w = h.half(), w.half()
    zeros = []
    for way in ("tiles", "gemm"):
        ww = w.clone().requires_grad_()
        with forward(way):
            out = linear_logprob(h, ww, target, tail_eps=2.0**-10, backend="triton")
        out.logprob.sum().backward()
        zeros.append((ww.grad == 0).all(1))
    assert torch.equal(*zeros) and 0.1 < zeros[0].float().mean() < 0.99


def test_strided_and_expanded_targets(device):
    h, w, b, target = head(40, 300, 16, torch.float16, device)
    for ids in (torch.stack((target, target.flip(0)), 1)[:, 0], target[:1].expand(40)):
        assert not ids.is_contiguous()
        plain = statistics_both_ways(h, w, b, ids.contiguous())
        for got, want in zip(statistics_both_ways(h, w, b, ids), plain, strict=True):
            assert torch.equal(got.logprob, want.logprob)


def test_rows_of_an_expanded_tensor_have_no_tensor_map():
    from riskpo_kernels.kernels.head_forward import _tma

    x = torch.randn(8, 64, dtype=torch.float16)
    assert _tma(x) and not _tma(x[:1].expand(8, 64)) and not _tma(x[:, 1:])


def test_an_unknown_way_is_refused(device):
    h, w, _, target = head(4, 20, 8, torch.float16, device)
    with forward("fastest"), pytest.raises(ValueError, match="gemm, warp-specialised"):
        linear_logprob(h, w, target, backend="triton")

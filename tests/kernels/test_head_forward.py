"""The forward's kernels, one by one: statistics of blocks against float64, the choice of blocks
against PyTorch's, programs in any order, launches and host time of a call."""

import math

import pytest
import torch

from riskpo_kernels import linear_logprob, logits_logprob
from riskpo_kernels.core import softmax
from riskpo_kernels.core.softmax import LogitMap, RowStats
from tests.compare import assert_all_close_as_plain
from tests.conftest import has_triton, skip_if_numpy_feels_a_rows_place
from tests.head_inputs import head
from tests.test_linear_logprob import three

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="needs triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="shown in the interpreter"),
]
CPU = torch.device("cpu")


def statistics_of(h, w, b, target, map, order=None):
    from riskpo_kernels.kernels.head_forward import BlockStatistics, statistics

    blocks = -(-w.shape[0] // 128)
    out = BlockStatistics.new(h.shape[0], blocks, True, CPU)
    statistics(h, w, b, target, order, map, out, first=0, offset=0)
    return out


def exact_statistics(h, w, b, target, map):
    """lse, gap [R, B] and z_t [R] in float64, in the contract's words."""
    x = (h.double() @ w.double().T + b.double()) * map.scale
    x = x if map.softcap is None else map.softcap * torch.tanh(x / map.softcap)
    t = map.temperature
    z = x / (t.double()[:, None] if isinstance(t, torch.Tensor) else t)
    z_t = z.gather(1, target[:, None])[:, 0]
    z = z.scatter(1, target[:, None], -math.inf)
    z = torch.nn.functional.pad(z, (0, -z.shape[1] % 128), value=-math.inf).unflatten(1, (-1, 128))
    lse = z.logsumexp(2)
    p = torch.softmax(z, 2)
    return lse, -(p * torch.log(p)).nan_to_num(0.0).sum(2), z_t


@pytest.mark.parametrize("variant", ["hopper", "ampere", "pointers"])
@pytest.mark.parametrize(
    "options",
    [(1.0, None, 0.7), (-0.5, None, 1.0), (-0.5, 4.0, None), (1.0, None, None)],
    ids=str,
)
def test_statistics_of_blocks(variant, options, monkeypatch, shuffled):
    """Every tile of the table, ragged, in any order of its programs; nothing is written beside."""
    from riskpo_kernels.kernels import head_tile

    tma = head_tile.FORWARDS[variant].tma
    monkeypatch.setattr(head_tile, "_tma", lambda x: tma)
    monkeypatch.setattr(head_tile, "forward_on", lambda capability, tma: variant)
    h, w, b, target = head(150, 700, 40, torch.float32, CPU)
    scale, softcap, temperature = options
    t = torch.linspace(0.4, 1.6, 150) if temperature is None else temperature
    map = LogitMap(scale, softcap, t)
    got = statistics_of(h, w, b, target, map)
    lse, gap, z_t = exact_statistics(h, w, b, target, map)
    for x, y in ((got.top + got.rest, lse), (got.gap, gap), (got.z_t, z_t)):
        assert (x - y).abs().max() < 5e-5
    assert len(shuffled) == 3, "the grid was not persistent"


def selected(lse, gap, z_t, target, eps, softcap, temperature):
    """Kept pairs by the kernel and by PyTorch, from the same statistics of blocks."""
    from riskpo_kernels.kernels import finish_rows
    from riskpo_kernels.kernels.head_forward import BlockStatistics

    n, blocks = lse.shape
    vocab, entropy = blocks * 128 - 5, gap is not None
    numbers = ("logprob", "entropy", "total", "peak", "log_sum")
    results = {k: torch.empty(n) if k != "entropy" or entropy else None for k in numbers}
    results["bits"] = torch.empty(-(-blocks // 8), n, dtype=torch.uint8)
    results["dense"] = torch.empty(n, dtype=torch.uint8)
    results["pairs"] = torch.empty(n, dtype=torch.int32)
    map = LogitMap(1.0, softcap, temperature)
    finish_rows.finish(
        BlockStatistics(lse, torch.zeros_like(lse), gap, z_t),
        target,
        None,
        map,
        results,
        rows=n,
        ignored=0,
        first=0,
        offset=0,
        vocab=vocab,
        eps=eps,
        cap=softmax.CAP,
        halvings=softmax.HALVINGS,
        dense_share=0.5,
    )
    stats = RowStats(*(results[k] for k in ("logprob", "entropy", "peak", "log_sum")))
    row_eps = softmax.row_eps(eps, stats, map)
    want = softmax.select(lse, target, stats, row_eps, entropy)
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = ((results["bits"].T[:, :, None] >> shifts) & 1).flatten(1)
    assert not bits[:, blocks:].any()
    assert torch.equal(results["pairs"], want.sum(1).int())
    assert torch.equal(results["dense"] != 0, want.sum(1) > 0.5 * blocks)
    return bits[:, :blocks].bool(), want


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_selection_is_bitwise_that_of_pytorch(entropy, softcap, shuffled):
    """Sharp and flat rows, many blocks just below the threshold, a NaN, a whole -inf row."""
    g = torch.Generator().manual_seed(0)
    n, blocks = 12, 1187
    lse = torch.randn(n, blocks, generator=g) * torch.linspace(0.3, 4, n)[:, None]
    lse[6:9] -= 9.0  # beside a likely target most blocks hold next to nothing
    lse[2], lse[3, 3] = -torch.inf, torch.nan
    gap = torch.rand(n, blocks, generator=g) * 4.85 if entropy else None
    z_t = torch.randn(n, generator=g) * 3
    target = torch.randint(blocks * 128 - 5, (n,), generator=g)
    for eps in (2.0**-14, 2.0**-7):
        got, want = selected(lse, gap, z_t, target, eps, softcap, 0.8)
        assert torch.equal(got, want), (got != want).sum()
        assert want[3].all() and 0.02 < want.float().mean() < 0.9


@pytest.mark.parametrize("shape", [(37, 1613, 24), (1, 7, 1), (130, 300, 72)], ids=str)
def test_matches_reference(shape):
    """Ragged rows, columns and depth in chunks of rows; a width of 1 has no tensor map."""
    h, w, b, target = head(*shape, torch.float16, CPU)
    if target.numel() > 3:
        target[3] = -100
    assert_all_close_as_plain(*three(h, w, b, target, backend="triton", memory_mib=0.3))


def test_certain_rows_and_forbidden_words():
    """A one-hot row, logits of -inf and -1e4, forbidden targets, an id outside the vocabulary."""
    h, w, b, target = head(20, 1500, 8, torch.float16, CPU)
    b[10:60], b[200:1100] = -1e4, -torch.inf  # several whole blocks
    h[3] = 0.0
    b[target[3]] = 300.0
    target[5] = 210
    options = dict(bias=b, return_entropy=True, ignore_index=None)
    ours, plain = (linear_logprob(h, w, target, backend=x, **options) for x in ("triton", "torch"))
    for x, y in zip(ours, plain, strict=True):
        assert torch.equal(x.isfinite(), y.isfinite())
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-5)
    assert ours.logprob[3] > -1e-6 and ours.logprob[5] == -torch.inf
    target[7] = 1500
    assert linear_logprob(h, w, target, backend="triton", **options).logprob[7] == -torch.inf
    alone = torch.full_like(b, -torch.inf)  # one word is allowed
    alone[9] = 0.0
    options["bias"] = alone
    got = linear_logprob(h, w, torch.full_like(target, 9), backend="triton", **options)
    assert (got.logprob == 0).all() and (got.entropy == 0).all()


def test_a_row_does_not_depend_on_its_company():
    skip_if_numpy_feels_a_rows_place(CPU)
    h, w, b, target = head(300, 700, 24, torch.float16, CPU)
    options = dict(bias=b, return_entropy=True, backend="triton", ignore_index=None)
    many = linear_logprob(h, w, target, **options)
    few = linear_logprob(h[250:255], w, target[250:255], **options)
    for x, y in zip(many, few, strict=True):
        assert torch.equal(x[250:255], y)


def both_passes(n, deterministic=True):
    """Results and gradients of both ops; with a softcap tiles have 64 rows, two a block."""
    h, w, b, target = head(n, 200, 16, torch.float32, CPU, sharpness=5.0)
    target[::7] = -100
    leaves = [x.clone().requires_grad_() for x in (h, w, b)]
    options = dict(return_entropy=True, tail_eps=1e-4, softcap=60.0, backend="triton")
    options |= dict(bias=leaves[2], memory_mib=0.6, deterministic=deterministic)
    out = linear_logprob(*leaves[:2], target, **options)
    (out.logprob * target + out.entropy).sum().backward()
    exact = linear_logprob(*leaves[:2], target, **options | dict(tail_eps=0.0))
    exact.logprob.sum().backward()  # every column, tile by tile
    z = (h @ w.T).requires_grad_()
    again = logits_logprob(z, target, return_entropy=True, backend="triton")
    (again.logprob - again.entropy).sum().backward()
    return [*out, *again, *(x.grad for x in (*leaves, z))]


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    from riskpo_kernels.kernels import (
        dense_gradient,
        finish_rows,
        head_forward,
        live_rows,
        softmax_rows,
    )
    from riskpo_kernels.lm_head import sparse_triton

    class Named:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            names.add(self.name)
            return self.kernel[grid]

    names = set()
    modules = dense_gradient, finish_rows, head_forward, live_rows, softmax_rows, sparse_triton
    for module in modules:
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Named(name, kernel))
    monkeypatch.setattr(sparse_triton, "FEWEST_TILES", 1)  # heavy blocks are divided
    monkeypatch.setattr(softmax, "DENSE_SHARE", {"cpu": 2.0, "cuda": 2.0})
    return names


EVERY = "statistics finish live dense dz dh gather dw fold _rows _gradient"


def test_every_grid_in_any_order(request, launched):
    """Order dependence would be a race on a GPU; unwritten memory holds NaN (tests/conftest.py).
    Atomics add in the order of the programs: those agree to rounding."""
    straight, atomic = both_passes(70), both_passes(70, deterministic=False)
    request.getfixturevalue("shuffled")
    for x, y in zip(straight, both_passes(70), strict=True):
        assert torch.equal(x, y) and x.isfinite().all()
    assert launched == {f"{name}_kernel" for name in EVERY.split()}
    for x, y in zip(atomic, both_passes(70, deterministic=False), strict=True):
        assert torch.allclose(x, y, atol=1e-5 * float(x.detach().abs().max()))


def test_targets_of_any_stride_and_type():
    h, w, b, target = head(40, 130, 16, torch.float16, CPU)
    for ids in (torch.stack((target, target.flip(0)), 1)[:, 0], target[:1].expand(40)):
        assert not ids.is_contiguous()
        got = linear_logprob(h, w, ids.int(), bias=b, backend="triton").logprob
        want = linear_logprob(h, w, ids.contiguous(), bias=b, backend="triton").logprob
        assert torch.equal(got, want)


def test_rows_of_an_expanded_tensor_have_no_tensor_map():
    from riskpo_kernels.kernels.head_tile import _tma

    x = torch.randn(8, 64, dtype=torch.float16)
    assert _tma(x) and not _tma(x[:1].expand(8, 64)) and not _tma(x[:, 1:])

"""The kernels of linear_divergence in the interpreter: against float64, programs in any order."""

import math

import pytest
import torch

from riskpo_kernels import linear_divergence, reference
from riskpo_kernels.core.matmul import counting, spans
from riskpo_kernels.core.softmax import LogitMap, RawTile
from riskpo_kernels.lm_head import divergence
from riskpo_kernels.lm_head.divergence_stats import Fold, Side
from tests.compare import assert_all_close_as_plain
from tests.conftest import has_triton
from tests.test_linear_divergence import KINDS, OPTIONS, double, inputs, results

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="needs triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="shown in the interpreter"),
]
PLAIN, SHAPED = OPTIONS.values()
CASES = {
    "exact": (torch.float32, PLAIN | {"tail_eps": 0.0}),
    "blocks": (torch.bfloat16, PLAIN),
    "logits of both": (torch.float16, SHAPED),
}


def small(dtype, rows=37, vocab=331):
    """A part of the inputs: rows that are masked and NaN among them, the last block 75 columns."""
    h, w, b, teacher, _ = inputs(dtype)
    cut = {"teacher_hidden": rows, "mask": rows, "teacher_weight": vocab, "teacher_bias": vocab}
    return h[:rows], w[:vocab], b[:vocab], {k: teacher[k][:n] for k, n in cut.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_reference(kind, case, shuffled, monkeypatch):
    """Several tiles either way, ragged, programs in any order; unwritten memory holds NaN. Some
    rows need each block, some blocks are dropped."""
    dtype, options = case
    kept = []
    keep_blocks = divergence.keep_blocks
    monkeypatch.setattr(
        divergence, "keep_blocks", lambda *x: kept.append(keep_blocks(*x)) or kept[-1]
    )
    h, w, b, teacher = small(dtype)
    options = {"kind": kind, **teacher, **options}
    if isinstance(options["temperature"], torch.Tensor):
        options["temperature"] = options["temperature"][: h.shape[0]]
    exact = (x.double() for x in (h, w, b))
    truth = results(reference.linear_divergence, *exact, **double(options))
    plain = results(reference.linear_divergence, h, w, b, **options)
    got = results(linear_divergence, h, w, b, memory_mib=0.06, backend="triton", **options)
    assert_all_close_as_plain(got, truth, plain)
    if options.get("tail_eps") != 0.0:
        keep = torch.cat(kept)
        assert len(kept) > 1 and keep.shape[1] == 3
        assert keep.any(0).all() and (keep.sum(1) > 1).any()
        assert keep.all() == ("softcap" in options)
    assert (got["divergence"] >= 0).all() and not got["divergence"][3::9].any()
    assert shuffled and not got["dhidden"][[3, 7, 8]].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dropped_stays_below_its_bound(kind):
    """Peaked rows; hidden states are the identity, so dW.T is the gradient of the logits."""
    eps, c = 2.0**-10, 3.0
    g = torch.Generator().manual_seed(0)
    z = torch.randn(640, 8, generator=g) * 10
    teacher = z + torch.randn(640, 8, generator=g)
    eye, found = torch.eye(8), {}
    for tail in (0.0, eps):
        w = z.clone().requires_grad_()
        options = {"kind": kind, "tail_eps": tail, "temperature": 0.6, "backend": "triton"}
        with counting() as work:
            out = linear_divergence(eye, w, eye, teacher, **options)
            forward = work.multiply_adds
            (out * c).sum().backward()
        found[tail] = w.grad, work.multiply_adds - forward
    lost = (found[0.0][0] - found[eps][0]).abs().sum(0) * 0.6  # of z, which is w / T
    assert 0 < lost.max() <= 32 * eps * c
    assert found[eps][1] < 0.65 * found[0.0][1]


@pytest.mark.parametrize("kind", KINDS)
def test_words_that_both_forbid_are_as_if_they_were_not_there(kind):
    """Whole blocks and parts of them, at the first and the last column; and a word that only the
    side that weighs knows makes the divergence infinite."""
    h, w, b, teacher = small(torch.float32, rows=10)
    h = h.nan_to_num()
    teacher = {k: x.nan_to_num() if x.is_floating_point() else x for k, x in teacher.items()}
    teacher["mask"] = torch.ones(10, dtype=torch.bool)
    allowed = torch.ones(w.shape[0], dtype=torch.bool)
    allowed[:130], allowed[150:160], allowed[-1] = False, False, False
    words = ("teacher_weight", "teacher_bias")
    cut = {k: x[allowed] if k in words else x for k, x in teacher.items()}
    truth = results(reference.linear_divergence, h, w[allowed], b[allowed], kind=kind, **cut)
    forbid = torch.where(allowed, 0.0, -torch.inf)
    options = {"kind": kind, "backend": "triton", "tail_eps": 1e-9}
    given = teacher | {"teacher_bias": teacher["teacher_bias"] + forbid}
    got = results(linear_divergence, h, w, b + forbid, **given, **options)
    for name, x in truth.items():
        mine = got[name]
        if name in ("dweight", "dbias"):
            assert not mine[~allowed].any()
            mine = mine[allowed]
        torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-5)
    one = forbid.clone()
    one[145] = -torch.inf
    sides = (b + one, teacher["teacher_bias"] + forbid)
    if kind == "reverse_kl":
        sides = (b + forbid, teacher["teacher_bias"] + one)
    known = dict(zip(("bias", "teacher_bias"), sides, strict=True))
    far = linear_divergence(h, w, **teacher | known, **options)
    assert torch.isfinite(far).all() if kind == "jsd" else torch.isposinf(far).all()


def tiles(rows, cols):
    """Raw products of both sides with a bias each, a student with a softcap; logits in float64."""
    g = torch.Generator().manual_seed(3)
    (p, q), (b, c) = torch.randn(2, rows, cols, generator=g) * 4, torch.randn(2, cols, generator=g)
    t = torch.linspace(0.5, 1.5, rows)
    q[:, 128:] -= 5.0
    z = 9 * torch.tanh((p + b).double() * 1.2 / 9), (q + c).double() * 0.9
    sides = RawTile(p, b, LogitMap(1.2, 9.0, t)), RawTile(q, c, LogitMap(0.9, None, t))
    return *sides, *(x / t[:, None] for x in z)


def test_blocks_of_a_later_tile_and_a_gradient_in_16_bits():
    """Nothing is written beside a tile's own blocks; 16 bits are the 32 rounded once."""
    from riskpo_kernels.kernels import divergence_tiles as kernels

    rows, cols = 21, 150
    p, q, zp, zq = tiles(rows, cols)
    found = torch.full((6, 5, rows), torch.nan)
    kernels.statistics("reverse_kl", p, q, found, 2)
    assert found[:, 2:4].isfinite().all() and found[:, [0, 1, 4]].isnan().all()
    for block, v in ((2, slice(0, 128)), (3, slice(128, 150))):
        top, mass = found[:2, block], found[2:4, block]
        want = torch.stack([x[:, v].logsumexp(1) for x in (zp, zq)]).float()
        torch.testing.assert_close(top + mass.log(), want)
        d = zp[:, v] - zq[:, v] - (top[0] - top[1])[:, None]
        e = torch.exp(zp[:, v] - top[0][:, None])
        for number, x in ((4, d), (5, d.abs())):
            torch.testing.assert_close(
                found[number, block], (e * x).sum(1).float(), rtol=1e-4, atol=1e-4
            )
    lse = torch.stack([zp.logsumexp(1), zq.logsumexp(1)]).float()
    none = torch.zeros(rows)
    numbers = torch.stack([lse[0], none, lse[1], none, none + 0.3, torch.linspace(-2, 2, rows)])
    for kind in KINDS:
        exact, small_ = torch.empty(rows, cols), torch.empty(rows, cols, dtype=torch.float16)
        sums = torch.empty(math.ceil(rows / kernels.ROWS), cols)
        kernels.gradient(kind, 0.3, p, q, numbers, exact, sums)
        kernels.gradient(kind, 0.3, p, q, numbers, small_, None)
        assert torch.equal(exact.half(), small_) and exact.abs().max() > 0.01
        torch.testing.assert_close(sums.sum(0), exact.sum(0))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_the_bound_of_a_block_is_its_formula(kind):
    """log p - log q of the first block lies 5 from that of the others."""
    from riskpo_kernels.kernels import divergence_tiles as kernels

    rows, cols = 21, 300
    p, q, zp, zq = tiles(rows, cols)
    fold = Fold(kind, kernels, rows, cols, p.raw)
    for v in spans(cols, 128):
        cut = (x._replace(raw=x.raw[:, v].contiguous(), bias=x.bias[v]) for x in (p, q))
        fold.tile(v, tuple(Side(x, x.raw, x.raw) for x in cut))
    fold.close()
    kl = fold.finish()[1]
    log_p, log_q = zp.log_softmax(1), zq.log_softmax(1)
    between = zq.logsumexp(1) - zp.logsumexp(1) - kl
    for bound, v in zip(fold.bounds(kl).T, spans(cols, 128), strict=True):
        mass = log_p[:, v].exp().sum(1)
        if kind == "forward_kl":
            want = mass + log_q[:, v].exp().sum(1)
        else:
            near = zp[:, v].amax(1) - zq[:, v].amax(1)
            far = log_p[:, v].exp() * (zp[:, v] - zq[:, v] - near[:, None]).abs()
            want = far.sum(1) + mass * (near + between).abs()
        torch.testing.assert_close(bound, want.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 130)], ids=str)
def test_small_shapes_keep_the_blocks_that_pytorch_keeps(kind, shape):
    """Biases and temperatures that are not contiguous."""
    n, vocab = shape
    h, w, b, _ = small(torch.float32)
    strided = b[: 2 * vocab : 2], torch.linspace(0.4, 1.5, 2 * n)[::2]
    tensors = (h[:n], w[:vocab] * 2, strided[0], h[4 : 4 + n], w[:vocab], None, None, strided[1])
    words = (kind, 0.3, 0.5, 1.0, None, 1.0, None, 1e-3, "", 1.0)
    ours, plain = (
        divergence._forward(*tensors, divergence.Words(*words, x)) for x in ("triton", "torch")
    )
    for x, y in zip(ours[:6], plain[:6], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for x, y in zip(ours[6:], plain[6:], strict=True):
        assert torch.equal(x, y)

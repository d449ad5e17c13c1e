"""Divergences to a teacher from two heads, against the float64 reference."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from riskpo_kernels import linear_divergence, reference, topk_divergence
from riskpo_kernels.core.matmul import counting
from riskpo_kernels.core.softmax import LogitMap, RawTile
from riskpo_kernels.lm_head import divergence
from riskpo_kernels.lm_head.divergence_stats import Fold, Room, Side, TorchTiles
from tests.compare import assert_all_close_as_plain
from tests.head_inputs import head, upstream

N, V, D, E = 97, 613, 24, 17
KINDS = ("forward_kl", "reverse_kl", "jsd")
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
OPTIONS = {
    "plain": {"temperature": 0.6},
    "logits of both": {
        "temperature": torch.linspace(0.4, 1.5, N),
        "softcap": 5.0,
        "scale": 1.3,
        "teacher_softcap": 7.0,
        "teacher_scale": 0.8,
        "beta": 0.2,
    },
}


def inputs(dtype):
    """Student and teacher that agree on the likely words; a row that is never read."""
    h, w, b, target = head(N, V, D, dtype, "cpu", sharpness=4.0)
    lift = torch.randn(D, E, generator=torch.Generator().manual_seed(5)).to(dtype) / E**0.5
    noise = torch.randn(N, E, generator=torch.Generator().manual_seed(6)).to(dtype) / 4
    mask = torch.arange(N) % 9 != 3
    h[3] = torch.nan
    teacher = {"teacher_hidden": h @ lift + noise, "teacher_weight": w @ lift}
    return h, w, b, {**teacher, "teacher_bias": b.flip(0) / 4, "mask": mask}, target


def results(op, h, w, b, *rest, **options):
    h, w, b = (x.detach().clone().requires_grad_() for x in (h, w, b))
    out = op(h, w, *rest, bias=b, **options)
    c = upstream(out.shape, "cpu")[0].index_fill(0, torch.tensor([7, 8]), 0.0)
    (out.double() * c).sum().backward()
    return {"divergence": out, "dhidden": h.grad, "dweight": w.grad, "dbias": b.grad}


def double(options):
    return {
        k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for k, x in options.items()
    }


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_reference(kind, dtype, options):
    h, w, b, teacher, _ = inputs(dtype)
    options = {"kind": kind, **teacher, **options}
    exact = (x.double() for x in (h, w, b))
    truth = results(reference.linear_divergence, *exact, **double(options))
    plain = results(reference.linear_divergence, h, w, b, **options)
    got = results(linear_divergence, h, w, b, memory_mib=0.3, **options)
    assert_all_close_as_plain(got, truth, plain)
    assert (got["divergence"] >= 0).all() and not got["divergence"][3::9].any()
    assert not got["dhidden"][[3, 7, 8]].any()


@pytest.mark.parametrize("out", ["student", "teacher", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_word_that_a_bias_rules_out_weighs_nothing(kind, out):
    """The first tile whole, and more: 0 log 0 is 0, and p log 0 infinite."""
    h, w, b, options, _ = inputs(torch.float32)
    for name, bias in (("student", b), ("teacher", options["teacher_bias"])):
        if out in (name, "both"):
            bias[:200], bias[500] = -torch.inf, -torch.inf
    options |= {"kind": kind, "beta": 0.2, "temperature": 0.6}
    exact = (x.double() for x in (h, w, b))
    truth = results(reference.linear_divergence, *exact, **double(options))
    plain = results(reference.linear_divergence, h, w, b, **options)
    got = results(linear_divergence, h, w, b, memory_mib=0.3, **options)
    if (kind, out) in {("forward_kl", "student"), ("reverse_kl", "teacher")}:
        assert torch.equal(got["divergence"].isinf(), options["mask"])
        assert torch.equal(truth["divergence"].isinf(), options["mask"])
        return
    assert all(x.isfinite().all() for x in truth.values())
    assert_all_close_as_plain(got, truth, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dropped_stays_below_its_bound(kind):
    """The identity as hidden states: dW.T is the gradient of the logits, row by row."""
    eps, c = 2.0**-10, 3.0
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4096, 16, generator=g, dtype=torch.float64) * 4
    teacher = z + torch.randn(4096, 16, generator=g, dtype=torch.float64)
    eye, found = torch.eye(16, dtype=torch.float64), {}
    for tail in (0.0, eps):
        w = z.clone().requires_grad_()
        options = {"kind": kind, "tail_eps": tail, "temperature": 0.6}
        with counting() as work:
            out = linear_divergence(eye, w, eye, teacher, **options)
            forward = work.multiply_adds
            (out * c).sum().backward()
        found[tail] = w.grad, work.multiply_adds - forward
    lost = (found[0.0][0] - found[eps][0]).abs().sum(0) * 0.6  # of z, which is w / T
    assert 0 < lost.max() <= 32 * eps * c
    assert found[eps][1] < 0.6 * found[0.0][1]


def test_a_shards_bound_counts_from_its_own_peaks():
    """Two ranks whose log p - log q lie 5 apart: one knows a block's distance from its own only."""
    z = torch.randn(4, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[:, 128:] += 2.0
    d = torch.zeros(256, dtype=torch.float64).index_fill(0, torch.arange(128, 256), 5.0)

    def folded(*parts):
        fold = Fold("reverse_kl", TorchTiles(Room(z)), 4, 128 * len(parts), z)
        for i, part in enumerate(parts):
            logits = (x[:, part].clone() for x in (z, z - d))
            sides = (Side(RawTile(x, None, LogitMap(1.0, None, 1.0)), z, z) for x in logits)
            fold.tile(slice(128 * i, 128 * (i + 1)), tuple(sides))
        fold.close()
        return fold

    one, other = slice(128), slice(128, 256)
    shard, whole = folded(one), folded(other, one)
    shard.m, shard.s, shard.u, shard.d0 = whole.m, whole.s, whole.u, whole.d0  # as merge does
    log_p, log_q = z.log_softmax(1), (z - d).log_softmax(1)
    p, gap = log_p.exp(), log_p - log_q
    kl = (p * gap).sum(1)
    torch.testing.assert_close(whole.finish()[1], kl)
    exact = (p * (gap - kl[:, None]).abs())[:, one].sum(1)
    assert (shard.bounds(kl)[:, 0] >= exact * (1 - 1e-9)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_common_offsets_and_a_teacher_that_is_the_student(kind):
    h, w, *_ = inputs(torch.float32)
    h = h.nan_to_num()
    own = linear_divergence(h.requires_grad_(), w, h.detach(), w, kind=kind)
    own.sum().backward()
    assert own.abs().max() < 1e-6 and h.grad.abs().max() < 1e-5
    teacher = w + 0.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    h = h.detach()
    near = linear_divergence(h.double(), w.double(), h, teacher, kind=kind)
    bias = torch.full((V,), 1024.0)
    far = linear_divergence(h, w, h, teacher, kind=kind, bias=bias)
    torch.testing.assert_close(far.double(), near, rtol=2e-3, atol=2e-3)


class Largest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.itemsize)
        return out


def both_passes(n, vocab, kind, tail_eps, memory_mib):
    """Called as functions: a dispatch mode does not see into an operator."""
    h, head = torch.randn(n, 4), torch.randn(vocab, 4)
    tensors = (h, head, None, h / 2, head, None, None, None)
    words = (kind, 0.5, 1.0, 1.0, None, 1.0, None, tail_eps, "", memory_mib, "torch")
    w = divergence.Words(*words)
    found = divergence._forward(*tensors, w)
    divergence._backward([True, True, False], (torch.ones(n),), tensors, found, w)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_rows_and_words(kind):
    n, vocab = 1024, 4096
    with Largest() as seen:
        both_passes(n, vocab, kind, 1e-30, 3)
    assert vocab * 4 <= seen.numbers < n * vocab / 8, seen.numbers


class Fresh(TorchDispatchMode):
    """Counts results as large as `size` numbers whose memory none of the arguments had."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = tree_leaves((args, kwargs))
        out = func(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in before if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.numel() >= self.size:
                self.count += x.untyped_storage().data_ptr() not in held
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail_eps", [0.0, 1e-30])
def test_tiles_share_their_memory(kind, tail_eps, monkeypatch):
    """Twice as many tiles make no more tensors of half a tile's size (a block's, backward)."""
    monkeypatch.setattr(divergence, "TILE", {"cpu": (256, 256)})
    counts = []
    for vocab in (512, 1024):
        with Fresh(256 * 64) as fresh:
            both_passes(256, vocab, kind, tail_eps, 300)
        counts.append(fresh.count)
    assert 0 < counts[0] == counts[1] < 12, counts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_topk(kind, dtype):
    h, w, b, teacher, target = inputs(dtype)
    t = teacher["teacher_hidden"], teacher["teacher_weight"]
    log_q = ((t[0].nan_to_num().double() @ t[1].double().T) / 0.7).log_softmax(-1)
    logprob, ids = log_q.topk(6)
    args = (ids, logprob.to(torch.promote_types(dtype, torch.float32)))
    options = {"kind": kind, "mask": teacher["mask"], "temperature": 0.7}
    exact = (x.double() for x in (h, w, b))
    truth = results(reference.topk_divergence, *exact, ids, args[1].double(), **options)
    plain = results(reference.topk_divergence, h, w, b, *args, **options)
    got = results(topk_divergence, h, w, b, *args, **options)
    if dtype == torch.float64:  # the bucket is 1 minus a sum: 1e-16 of 6e-8
        for name, x in got.items():
            torch.testing.assert_close(x, truth[name], rtol=1e-7, atol=1e-7)
    else:
        assert_all_close_as_plain(got, truth, plain)
    whole = reference.linear_divergence(
        h.double(), w.double(), t[0].double(), t[1].double(), bias=b.double(), **options
    )
    assert (got["divergence"].double() <= whole + 1e-5).all()  # merging words loses, never adds


@pytest.mark.parametrize("kind", KINDS)
def test_topk_of_words_without_probability(kind):
    """The teacher cut one of the ids, and a bias the other side's."""
    h, w, b, teacher, _ = inputs(torch.float32)
    ids = torch.tensor([5, 9, 2]).expand(N, 3)
    q = torch.tensor([0.7, 0.2, 0.0]).log().expand(N, 3)
    b[2 if kind == "forward_kl" else 9] = -torch.inf
    q = q if kind != "reverse_kl" else q.nan_to_num(neginf=-8.0)
    options = {"kind": kind, "mask": teacher["mask"]}
    exact = (x.double() for x in (h, w, b))
    truth = results(reference.topk_divergence, *exact, ids, q.double(), **options)
    plain = results(reference.topk_divergence, h, w, b, ids, q, **options)
    got = results(topk_divergence, h, w, b, ids, q, **options)
    assert all(x.isfinite().all() for x in truth.values())
    assert_all_close_as_plain(got, truth, plain)


def test_topk_tail_of_a_near_certain_student():
    """The student leaves 1e-5 to all but the teacher's ids."""
    h = torch.ones(1, 1, requires_grad=True)
    p = torch.full((1002,), 1e-8, dtype=torch.float64)
    p[:2] = torch.tensor([1 - 1e-5 - 1e-3, 1e-3], dtype=torch.float64)
    w = p.log()[:, None].float()
    ids, q = torch.tensor([[0, 1]]), torch.tensor([[0.9, 0.05]])
    got = topk_divergence(h, w, ids, q.log())
    truth = (q.double() * (q.double().log() - p[:2].log())).sum() + 0.05 * (
        torch.tensor(0.05, dtype=torch.float64).log() - p[2:].sum().log()
    )
    torch.testing.assert_close(got[0].double(), truth, rtol=1e-3, atol=0)


def refused(**changes):
    h, w, b, teacher, _ = inputs(torch.float32)
    given = {"hidden": h, "weight": w, "kind": "jsd", **teacher, **changes}
    return lambda: linear_divergence(**given)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "kl"}, "one of"),
        ({"beta": 1.0}, "between 0 and 1"),
        (
            {"teacher_weight": torch.randn(V + 1, E), "teacher_bias": None},
            "heads of 613 and 614 words",
        ),
        ({"teacher_weight": torch.randn(V, E, requires_grad=True)}, r"teacher_weight.detach\(\)"),
        ({"teacher_hidden": torch.randn(N - 1, E)}, "target of shape"),
        ({"mask": torch.ones(N - 1, dtype=torch.bool)}, "mask of shape"),
        ({"teacher_scale": 0.0}, "scale"),
        ({"backend": "cuda"}, "backend"),
        (
            {"backend": "triton", "teacher_bias": None}
            | {
                f"teacher_{k}": torch.randn(n, E).double()
                for k, n in (("hidden", N), ("weight", V))
            },
            "the input is float64",
        ),
        ({"memory_mib": 1e-3}, "Raise memory_mib"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        refused(**changes)()


def test_topk_refusals():
    h, w, *_ = inputs(torch.float32)
    ids = torch.arange(4).expand(N, 4)
    q = torch.full((N, 4), 0.2).log()
    for bad, message in (
        ((ids[:, :1].expand(N, 4), q), "an id twice"),
        ((ids, q + 1), "sum to more than 1"),
        ((ids[:, 0], q), "its K ids"),
        ((ids, q[:, :2]), "teacher_logprob"),
    ):
        with pytest.raises(ValueError, match=message):
            topk_divergence(h, w, *bad)

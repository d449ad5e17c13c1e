"""Log-probs under a sampler's support, and of K targets a row: columns that are gathered."""

import pytest
import torch

from riskpo_kernels import linear_logprob, reference
from riskpo_kernels.core.matmul import counting
from riskpo_kernels.lm_head import gathered
from tests.compare import FACTOR, assert_all_close_as_plain
from tests.conftest import has_triton
from tests.head_inputs import head, upstream

N, V, D = 97, 613, 24
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
LOGITS = {
    "plain": {},
    "softcap": {"softcap": 5.0, "scale": 1.3, "temperature": 0.7},
    "row temperatures": {"temperature": torch.linspace(0.4, 1.5, N)},
}


def ragged(target, seed=0):
    """(token_ids, offsets): 1 to 40 ids a row, the target among them at any place."""
    g = torch.Generator().manual_seed(seed)
    lists = []
    for t in target.tolist():
        others = torch.randperm(V, generator=g)[: int(torch.randint(40, (1,), generator=g))]
        mine = torch.cat([others[others != t], torch.tensor([max(t, 0)])])
        lists.append(mine[torch.randperm(len(mine), generator=g)].unique())
    counts = torch.tensor([len(x) for x in lists])
    return torch.cat(lists), torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def dense(support):
    """The same as [N, K], its padding between the ids."""
    ids, offsets = support
    rows = [ids[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    square = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    return square.roll(3, 1).int()


def results(op, h, w, b, target, **options):
    h, w, b = (x.detach().clone().requires_grad_() for x in (h, w, b))
    out = op(h, w, target, bias=b, return_entropy=True, **options)
    total = 0.0
    for seed, x in enumerate(out):
        c = upstream(x.shape, "cpu", seed=seed)[0]
        c = c.index_fill(0, torch.tensor([7, 8]), 0.0)  # two rows that nothing is sent to
        total = total + (x.masked_fill(x.isneginf(), 0.0).double() * c).sum()
    total.backward()
    named = zip(
        ("logprob", "entropy", "lse", "dhidden", "dweight", "dbias"),
        (*out, h.grad, w.grad, b.grad),
        strict=True,
    )
    return dict(named)


def three(h, w, b, target, *, own=None, **options):
    """What ours gives, the truth, and what plain PyTorch gives."""
    exact = results(reference.linear_logprob, *(x.double() for x in (h, w, b)), target, **options)
    plain = results(reference.linear_logprob, h, w, b, target, **options)
    return results(linear_logprob, h, w, b, target, **options, **(own or {})), exact, plain


def inputs(dtype, *, k=None):
    h, w, b, target = head(N, V, D, dtype, "cpu")
    if k is not None:
        g = torch.Generator().manual_seed(3)
        target = torch.cat([torch.randint(V, (N, k - 1), generator=g), target[:, None]], 1)
        target[4, 1] = -100
        target[6, 2] = target[6, 3]
    target[[3, 20]] = -100
    h[3] = torch.nan
    return h, w, b, target


@pytest.mark.parametrize("options", LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_support(dtype, options):
    h, w, b, target = inputs(dtype)
    support = ragged(target)
    for given in (support, dense(support)):
        got, exact, plain = three(h, w, b, target, support=given, **options)
        assert_all_close_as_plain(got, exact, plain)
        assert not got["dhidden"][[3, 7, 8, 20]].any() and (got["logprob"][[3, 20]] == 0).all()


def test_support_is_that_of_masked_logits():
    """What is done today: all logits, -inf where nothing was kept."""
    h, w, b, target = head(N, V, D, torch.float32, "cpu")
    ids, offsets = support = ragged(target)
    rows = torch.arange(N).repeat_interleave(offsets.diff())
    kept = torch.zeros(N, V, dtype=torch.bool).index_put_((rows, ids), torch.tensor(True))
    masked = (h @ w.T + b).masked_fill(~kept, -torch.inf).log_softmax(-1)
    got = linear_logprob(h, w, target, bias=b, support=support, return_entropy=True)
    torch.testing.assert_close(
        got.logprob, masked.gather(1, target[:, None])[:, 0], rtol=1e-5, atol=1e-5
    )
    entropy = torch.distributions.Categorical(logits=masked.clamp(min=-1e9)).entropy()
    torch.testing.assert_close(got.entropy, entropy, rtol=1e-4, atol=1e-5)


def test_support_in_small_pieces(monkeypatch):
    """Rows that want more than the workspace holds, and no pass over the vocabulary."""
    h, w, b, target = inputs(torch.float32)
    support = ragged(target)
    whole = results(linear_logprob, h, w, b, target, support=support)
    monkeypatch.setattr(gathered, "CPU_PAIRS", 40 * D)
    with counting() as work:
        pieces = results(linear_logprob, h, w, b, target, support=support)
    for name, x in whole.items():
        torch.testing.assert_close(pieces[name], x, rtol=1e-5, atol=1e-5, msg=name)
    assert work.multiply_adds < 8 * len(support[0]) * D < N * V * D


def test_a_target_outside_its_support():
    h, w, b, target = head(N, V, D, torch.float64, "cpu")
    ids, offsets = ragged(target)
    ids[offsets[9] : offsets[10]] = (target[9] + 1 + torch.arange(offsets[10] - offsets[9])) % V
    for backend in ("torch", "reference"):
        with pytest.raises(ValueError, match="1 targets outside their support"):
            linear_logprob(h, w, target, support=(ids, offsets), backend=backend)
    options = {"support": (ids, offsets), "outside_support": "-inf"}
    got, exact, plain = three(h, w, b, target, **options)
    assert got["logprob"].isneginf().nonzero().flatten().tolist() == [9]
    for x in (got, exact, plain):
        x["logprob"][9] = 0
    assert_all_close_as_plain(got, exact, plain)
    alone = torch.zeros(N, dtype=h.dtype).index_fill(0, torch.tensor([9]), 1.0)
    for op in (linear_logprob, reference.linear_logprob):
        h = h.detach().requires_grad_()
        logprob = op(h, w, target, **options).logprob
        (sent,) = torch.autograd.grad(logprob, h, alone)
        assert not sent.any()  # -inf is a constant


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda ids, off: (ids + V, off), "ids of support outside the vocabulary"),
        (lambda ids, off: (ids - V, off), "ids of support outside the vocabulary"),
        (lambda ids, off: (ids, off[:-1]), "offsets of shape"),
        (lambda ids, off: (ids, off.index_fill(0, torch.tensor([1]), 50)), "none below the one"),
        (lambda ids, off: (ids, off + 1), "token_ids"),
        (lambda ids, off: (ids.double(), off), "integers"),
        (
            lambda ids, off: (torch.cat([ids, ids[-1:]]), torch.cat([off[:-1], off[-1:] + 1])),
            "twice",
        ),
        (lambda ids, off: (ids, off.index_fill(0, torch.tensor([1]), 0)), "empty support"),
        (lambda ids, off: ids, r"ids \[97, 'K'\]"),
        (lambda ids, off: {"ids": ids}, "token_ids, offsets"),
    ],
)
def test_supports_that_are_refused(spoil, message):
    h, w, _, target = head(N, V, D, torch.float32, "cpu")
    support = spoil(*ragged(target))
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=message):
            linear_logprob(h, w, target, support=support, backend=backend)


def test_an_ignored_row_needs_no_support():
    h, w, _, target = head(N, V, D, torch.float32, "cpu")
    ids, offsets = ragged(target)
    target[0] = -100
    without = ids[offsets[1] :], (offsets - offsets[1]).clamp(min=0)
    for backend in ("torch", "reference"):
        full = linear_logprob(h, w, target, support=(ids, offsets), backend=backend).logprob
        got = linear_logprob(h, w, target, support=without, backend=backend).logprob
        assert got[0] == 0
        torch.testing.assert_close(got, full, rtol=1e-6, atol=1e-6)


def test_support_takes_one_target_a_row():
    h, w, _, target = head(N, V, D, torch.float32, "cpu")
    support = ragged(target)
    with pytest.raises(ValueError, match="one target a row"):
        linear_logprob(h, w, target[:, None], support=support)
    with pytest.raises(ValueError, match="outside_support"):
        linear_logprob(h, w, target, support=support, outside_support="zero")


@pytest.mark.parametrize("options", LOGITS.values(), ids=LOGITS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_several_targets(dtype, options):
    h, w, b, target = inputs(dtype, k=5)
    got, exact, plain = three(h, w, b, target, **options)
    assert_all_close_as_plain(got, exact, plain)
    assert got["logprob"].shape == (N, 5) and (got["logprob"] <= 0).all()
    assert got["logprob"][4, 1] == 0 and not got["logprob"][[3, 20]].any()
    assert got["logprob"][6, 2] == got["logprob"][6, 3]  # the same id twice


@pytest.mark.skipif(not has_triton(), reason="")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_several_targets_from_the_kernels(dtype):
    """The pass over the vocabulary is the kernels', the gathered columns are PyTorch's."""
    h, w, b, target = inputs(dtype, k=5)
    got, exact, plain = three(h, w, b, target, own={"backend": "triton"})
    # the interpreter multiplies in one order, the backward in another
    assert_all_close_as_plain(got, exact, plain, factor=12 if dtype == torch.float32 else FACTOR)


def test_several_targets_one_of_them_certain():
    """-log p of 1e-12 beside others that are far below, at a common offset of 1e4."""
    h, w = torch.zeros(2, 3), torch.zeros(V, 3)
    h[:, 0], w[:, 0], w[5, 1], h[:, 1] = 1.0, 1e4, 1.0, 40.0
    target = torch.tensor([[9, 5, 200], [5, 9, 9]])
    got = linear_logprob(h, w, target).logprob.double()
    rest = -torch.log1p((V - 1) * torch.exp(torch.tensor(-40.0, dtype=torch.float64)))
    truth = torch.where(target == 5, rest, rest - 40)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=0)


def test_several_targets_take_one_pass():
    h, w, _, target = inputs(torch.float32, k=5)
    with counting() as one:
        linear_logprob(h, w, target[:, 0])
    with counting() as five:
        linear_logprob(h, w, target)
    assert five.multiply_adds <= one.multiply_adds + N * (V + 5) * D * 3 // N + 6 * N * D

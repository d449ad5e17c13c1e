"""What dropping blocks costs, seen from outside the op: its gradients beside float64, row by row.

One row at a time: dW[v] is then dz_v h, so the rows of dW that are zero say which columns were
dropped, and what they held is summed from the float64 gradient of the logits.
"""

import math

import pytest
import torch

from riskpo_kernels import linear_logprob, reference
from riskpo_kernels.core.softmax import BLOCK, LogitMap, RowStats, n_blocks, row_eps
from riskpo_kernels.lm_head import operator
from tests.compare import assert_all_close_as_plain, assert_close_as_plain
from tests.head_inputs import split_columns

pytestmark = pytest.mark.usefixtures("recomputed")
EPS = 2.0**-14
SMALLEST = 2.0**-15  # ||dz||_1 / |c| below which the relative bound stays that of a row this large


def near_one_hot(doubt, vocab=4000, width=16):
    """One row whose target has probability 1 - doubt; the other words in order of frequency."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(vocab, width, generator=g) / width**0.5
    h = torch.randn(1, width, generator=g)
    h[:, 0], w[:, 0] = 1.0, -2.5 * torch.log(torch.arange(1.0, vocab + 1))
    target = torch.tensor([7])
    z = h.double() @ w.double().T
    others = z.index_fill(1, target, -math.inf).logsumexp(1)
    w[7, 0] += (others + math.log((1 - doubt) / doubt) - z[:, 7]).float().item()
    return h, w, target


def evenly(doubt=None, vocab=151_936, width=4):
    """One row whose mass beside the target is the same in every block: `doubt` in all, or just
    under the threshold in each."""
    w = torch.randn(vocab, width, generator=torch.Generator().manual_seed(0))
    mass = 0.95 * EPS if doubt is None else doubt / n_blocks(vocab)
    target = torch.tensor([min(70_000, vocab - 1)])
    w[:, 0] = math.log(mass / BLOCK) - math.log1p(-mass * n_blocks(vocab))
    w[target, 0] = 0.0
    h = torch.zeros(1, width)
    h[:, 0] = 1.0
    return h, w, target


def descending(vocab=151_936, width=4):
    """Block masses from just under the threshold down to e^-12 of it: a part may go."""
    h, w, target = evenly(vocab=vocab, width=width)
    fall = torch.linspace(0, 12, n_blocks(vocab)).repeat_interleave(BLOCK)[:vocab]
    w[:, 0] -= fall.index_fill(0, target, 0.0)
    return h, w, target


def undecided(blocks=42, width=4):
    """Two words alike, and blocks from just under half the threshold down to e^-4 of it: their
    entropy's gradient is 15 times their mass."""
    h, w, target = evenly(vocab=blocks * BLOCK, width=width)
    fall = torch.linspace(0, 4, blocks).repeat_interleave(BLOCK)
    w[:, 0] = math.log(0.45 * EPS / BLOCK) - fall
    w[: 2 * BLOCK, 0] = -40.0
    w[3, 0] = w[BLOCK, 0] = math.log(0.5)
    return h, w, torch.tensor([3])


ROWS = {
    f"1 - {doubt:g}": lambda d=doubt: near_one_hot(d) for doubt in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
}
ROWS |= {"evenly under the threshold": evenly, "descending": descending, "undecided": undecided}
ROWS |= {f"evenly, 1 - {doubt:g}": lambda d=doubt: evenly(d) for doubt in (1e-3, 1e-5)}
DROPPING = [name for name in ROWS if "evenly" not in name]  # the cap keeps the others whole
# Rows made to lose as much as they may: 256 eps of the gradient is more than bfloat16 rounds off
CONTRIVED = ("descending", "undecided")
# upstream gradients of logprob, entropy and lse
UPSTREAM = [(1.0, 0.0, 0.0), (-1.0, 0.5, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.5, 0.0, -0.5)]


def results(op, h, w, target, c, g, e, dtype, **options):
    """Values and gradients; without an entropy's gradient no entropy is asked for either."""
    hh, ww = (x.detach().clone().to(dtype).requires_grad_() for x in (h, w))
    out = op(hh, ww, target, return_entropy=g != 0, **options)
    values = {"logprob": out.logprob} | ({"entropy": out.entropy} if g else {})
    (c * out.logprob + (g * out.entropy if g else 0) + e * out.lse).sum().backward()
    return values | {"dhidden": hh.grad, "dweight": ww.grad}


def logit_gradient(h, w, target, c, g, e):
    """dz [V] of one row in float64, from the definition."""
    log_p = (h.double() @ w.double().T)[0].log_softmax(0)
    p = log_p.exp()
    dz = (e - c) * p - g * p * (log_p - (p * log_p).sum())
    dz[target] += c
    return dz


@pytest.mark.parametrize(("c", "g", "e"), UPSTREAM, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_what_a_row_loses_is_bounded(name, c, g, e):
    """float32 at 2^-14: values as ever; the dropped columns hold at most 32 eps (|c - e| + |g|),
    without an entropy 256 eps (||dz||_1 + |e|) as well; dH, dW are off by that and rounding."""
    h, w, target = ROWS[name]()
    truth = results(reference.linear_logprob, h, w, target, c, g, e, torch.float64)
    plain = results(reference.linear_logprob, h, w, target, c, g, e, torch.float32)
    options = {"tail_eps": EPS, "backend": "torch"}
    got = results(linear_logprob, h, w, target, c, g, e, torch.float32, **options)
    for value in truth.keys() - {"dhidden", "dweight"}:
        assert_close_as_plain(value, got[value], truth[value], plain[value])

    dz = logit_gradient(h, w, target, c, g, e)
    dropped = (got["dweight"] == 0).all(1)
    lost, whole = dz[dropped].abs().sum(), dz.abs().sum()
    bound = 32 * EPS * (abs(c - e) + abs(g))
    assert lost <= bound
    if g == 0:
        assert lost <= 256 * EPS * (whole + abs(e)).clamp(min=SMALLEST)
    assert not dropped[target], "the target's own column was dropped"
    assert dropped.any() == (name in DROPPING)

    kept = dz.masked_fill(dropped, 0.0)
    wanted = {"dhidden": kept[None] @ w.double(), "dweight": kept[:, None] * h.double()}
    room = {"dhidden": w.double().norm(dim=1).max(), "dweight": h.double().norm()}
    for gradient, x in wanted.items():
        rounding = plain[gradient].double() - truth[gradient]
        assert_close_as_plain(gradient, got[gradient], x, x + rounding, factor=5)
        error = (got[gradient] - truth[gradient]).norm(dim=1).sum()
        assert error <= bound * room[gradient] + 5 * rounding.norm(dim=1).sum() + 1e-7, gradient


@pytest.mark.parametrize(("c", "g", "e"), UPSTREAM, ids=str)
@pytest.mark.parametrize("name", [name for name in ROWS if name not in CONTRIVED])
def test_one_row_in_bfloat16_stays_inside_the_rule(name, c, g, e):
    """The default threshold and a row alone: its error is measured against its own gradient."""
    h, w, target = ROWS[name]()
    h, w = h.bfloat16(), w.bfloat16()

    def apart(op, dtype, **options):
        return split_columns(results(op, h, w, target, c, g, e, dtype, **options), target)

    assert_all_close_as_plain(
        apart(linear_logprob, torch.bfloat16, backend="torch"),
        apart(reference.linear_logprob, torch.float64),
        apart(reference.linear_logprob, torch.bfloat16),
    )


CAP, SCALE, COOL = 30.0, 0.5, 0.8  # softcap, scale and temperature


def capped_rows(eps, sloped, n=60, blocks=32):
    """Raw logits [n, V] that lose as much as a row can, and the slope of the softcap at their
    target: a target, one rival, and thirty blocks just under the threshold, with or without it."""
    g = torch.Generator().manual_seed(0)
    saturation = 1 - 0.7 * 10 ** -torch.linspace(0, 5, n, dtype=torch.float64)
    doubt = 0.5 ** (1 + 9 * torch.rand(n, generator=g, dtype=torch.float64))
    doubt[::2] = 0.5  # two logits alike, saturated alike
    top, slope = CAP * saturation / COOL, 1 - saturation**2
    lse = top - torch.log1p(-doubt)
    theta = eps * (slope if sloped else 1.0) * (16 * doubt).clamp(max=1.0)
    z = (lse + torch.log(0.95 * theta / BLOCK))[:, None].repeat(1, blocks * BLOCK)
    z[:, : 2 * BLOCK] = -0.999 * CAP / COOL
    z[:, 0], z[:, BLOCK] = top, lse + torch.log(doubt)
    assert (z.abs() < CAP / COOL).all()
    return torch.atanh(z * COOL / CAP) * CAP / SCALE, slope


def lost_of_raw(raw, tail_eps):
    """(what each row of target 0 loses, its whole gradient) of the raw logits, in the 1-norm."""
    dropped = torch.empty(raw.shape, dtype=torch.bool)
    options = {"softcap": CAP, "scale": SCALE, "temperature": COOL, "tail_eps": tail_eps}
    for i, row in enumerate(raw.float()):
        w = row[:, None].clone().requires_grad_()  # width 1: dW is the gradient of raw logits
        out = linear_logprob(torch.ones(1, 1), w, torch.tensor([0]), backend="torch", **options)
        out.logprob.sum().backward()
        dropped[i] = w.grad[:, 0] == 0
    dropped[:, [0, BLOCK]] = False  # kept, though a slope that rounds to 0 may leave nothing
    capped = torch.tanh(raw * SCALE / CAP)
    dz = (capped * CAP / COOL).softmax(1)
    dz[:, 0] -= 1
    size = (dz * (1 - capped**2) * SCALE / COOL).abs()
    return (size * dropped).sum(1), size.sum(1)


def test_softcap_bounds_what_raw_logits_lose(monkeypatch):
    """Both bounds hold for the gradient of the raw logits, however far the softcap saturates those
    that are kept: the threshold is times the slope there. Left out, a row may lose all it has."""
    raw, slope = capped_rows(EPS, sloped=True)
    lost, whole = lost_of_raw(raw, EPS)
    assert (lost > 0).float().mean() > 0.9, "next to nothing is dropped: the test shows nothing"
    assert (lost <= 32 * EPS * slope * SCALE / COOL * (1 + 1e-4)).all()
    assert (lost <= 256 * EPS * whole).all()
    assert (lost > 64 * EPS * whole).any(), "the bound is far away"
    raw, _ = capped_rows(EPS, sloped=False)
    lost, whole = lost_of_raw(raw, EPS)
    assert (lost <= 256 * EPS * whole).all()
    monkeypatch.setattr(operator, "row_eps", lambda eps, stats, map: eps)
    lost, whole = lost_of_raw(raw, EPS)
    assert (lost > 256 * EPS * whole).any(), "the slope need not be looked at"


def test_unlikely_target_near_its_softcap():
    """The target's own slope counts: its part of the gradient is what the rest is measured by."""
    map = LogitMap(1.0, 10.0, torch.tensor([1.0, 2.0]))
    stats = RowStats(*(torch.tensor([x, x]) for x in (-12.0, 1.0, 3.0, 0.5)))
    # the target's logit is -8.5: 0.85 of the softcap and, at temperature 2, beyond it
    eps = row_eps(2.0**-10, stats, map)
    torch.testing.assert_close(eps, 2.0**-10 * torch.tensor([1 - 0.85**2, 0.0]))
    assert row_eps(0.5, stats, LogitMap(1.0, None, 1.0)) == 0.5

"""clipped_surrogate and sequence_logprob: numbers against float64, golden numbers, formulas."""

import pytest
import torch

from riskpo_kernels import reference, sequence_logprob
from riskpo_kernels.policy_loss.formulas import KL, LOSSES, held
from tests.surrogate_inputs import AGGREGATES, ALL, BACKENDS, WIDE, check, padded, run, tokens

FULL = {"dual_clip": 1.2, "kl_coef": 0.1, "entropy_coef": 0.05, "constant": 50.0}


def pick(x, *names):
    return {name: x[name] for name in ("logprob", "old_logprob", "advantage", *names)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", ["sequence", "token"])
@pytest.mark.parametrize("layout", ["flat", "masked", "padded"])
def test_matches_float64(backend, ratio, layout, device):
    x, cu, mask = tokens(device)
    where = {"cu_seqlens": cu, "mask": mask if layout == "masked" else None}
    if layout == "padded":
        counted = torch.ones(len(x["logprob"]), device=device)
        where = {"mask": padded(counted, cu, fill=0.0)}
        x = {n: v if len(v) == len(cu) - 1 else padded(v, cu, fill=0.1) for n, v in x.items()}
    for kl in ("k1", "k2"):
        check(x, backend=backend, ratio=ratio, kl=kl, **FULL | WIDE[ratio] | where)
    for aggregate in AGGREGATES:
        options = FULL | WIDE[ratio] | where | {"aggregate": aggregate}
        check(x, backend=backend, ratio=ratio, **options)
        options = {"aggregate": aggregate, "constant": 50.0} | where | WIDE[ratio]
        check(pick(x), backend=backend, ratio=ratio, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_every_branch_is_populated(backend, ratio, device):
    x, cu, mask = tokens(device)
    options = WIDE[ratio] | {"cu_seqlens": cu, "mask": mask, "ratio": ratio, "dual_clip": 1.2}
    got, truth = check(pick(x), backend=backend, **options)
    low, high, cut = (truth[f"clip{n}_fraction"].item() for n in ("_low", "_high", ""))
    assert min(low, high, 1 - cut) > 0.05, (low, high, cut)
    if ratio == "token":
        assert cut - low - high > 0.05, "the dual clip"
    for name in truth:
        if name.endswith("fraction"):
            assert abs(got[name] - truth[name]) < 1e-6, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend, device):
    x, cu, _ = tokens(device)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        y = {name: value.to(dtype) for name, value in x.items()}
        for ratio in ("sequence", "token"):
            options = FULL | WIDE[ratio] | {"cu_seqlens": cu, "ratio": ratio}
            got, _ = check(y, backend=backend, **options)
            assert got["loss"].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_per_token(backend, device):
    x, cu, mask = tokens(device)
    n = len(x["logprob"])
    each = torch.linspace(0.5, 1.5, n, device=device)
    each[3], mask[3] = float("nan"), False
    where = {"cu_seqlens": cu, "mask": mask}
    options = FULL | where | {"ratio": "token", "aggregate": "token-mean"}
    check(x | {"correction": each}, backend=backend, **options)
    a = torch.randn(n, device=device)
    check(x | {"advantage": a}, backend=backend, **options)
    check(x | {"advantage": a, "correction": each}, backend=backend, **options)
    check(x | {"correction": each}, backend=backend, **where, **WIDE["sequence"], entropy_coef=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_sequences_longer_than_a_block(backend, ratio, device):
    x, cu, mask = tokens(device, lengths=(3, 1300, 0, 600))
    check(x, backend=backend, ratio=ratio, cu_seqlens=cu, mask=mask, **FULL | WIDE[ratio])


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_tokens_without_sequences(backend, device):
    x, _, _ = tokens(device, lengths=(2500,))
    x = {n: v if len(v) > 1 else v.expand(2500).contiguous() for n, v in x.items()}
    x["advantage"] = torch.randn(2500, device=device)
    mask = torch.rand(2500, device=device) > 0.3
    for where in ({}, {"mask": mask}):
        check(x, backend=backend, ratio="token", aggregate="token-mean", **where, **FULL)


G6_OLD = [[-1, -2, -0.5, 0], [-0.3, -0.7, 0, 0], [-1.5, -0.2, -0.4, -0.9]]
G6_NEW = [[-0.8, -2.3, -0.5, 0], [-0.2, -0.3, 0, 0], [-1.9, -0.5, -0.4, -1.4]]
G6_MASK = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]


def golden(backend, device, **options):
    x = {"logprob": G6_NEW, "old_logprob": G6_OLD, "advantage": [-2.0, 1.0, -0.5]}
    x = {name: torch.tensor(v, device=device, dtype=torch.float32) for name, v in x.items()}
    return run(x, mask=torch.tensor(G6_MASK, device=device), backend=backend, **options)


def near(got, expected):
    expected = torch.tensor(expected, dtype=torch.float64, device=got.device)
    torch.testing.assert_close(got.double(), expected, atol=1.5e-6, rtol=0)


@pytest.mark.parametrize("backend", ALL)
def test_golden_sequence_ratio(backend, device):
    got = golden(backend, device, clip_low=0.2, clip_high=0.2)
    near(got["loss"], 0.378144)
    near(got["dlogprob"], [[0.214937] * 3 + [0], [0] * 4, [0] * 4])
    near(got["ratio_mean"], (0.967216 + 1.284025 + 0.740818) / 3)
    near(got["ratio_max"], 1.284025)
    got = golden(backend, device)  # 3e-4 / 4e-4: every sequence is clipped
    near(got["loss"], 0.499617)
    near(got["dlogprob"], [[0.0] * 4] * 3)
    near(got["clip_fraction"], 1.0)
    near(got["zero_coefficient_fraction"], 1.0)


@pytest.mark.parametrize("backend", ALL)
def test_golden_token_ratio(backend, device):
    losses = {"token-mean": 0.604182, "sequence-mean": 0.428894, "sequence-sum": 1.812545}
    for aggregate, loss in losses.items():
        got = golden(backend, device, ratio="token", dual_clip=3.0, aggregate=aggregate)
        near(got["loss"], loss)
        if aggregate == "token-mean":
            row = [0.271423, 0, 0.222222, 0]
            near(got["dlogprob"], [row, [-0.122797, 0, 0, 0], [0, 0, 0.055556, 0]])
        near(got["clip_low_fraction"], 4 / 9)
        near(got["clip_high_fraction"], 1 / 9)
        assert got["tokens"] == 9


@pytest.mark.parametrize("backend", ALL)
def test_golden_dual_clip(backend, device):
    log5 = torch.tensor([5.0], device=device).log()
    x = {"logprob": log5 - 9, "old_logprob": 0 * log5 - 9, "advantage": 0 * log5 - 2}
    plain = {"ratio": "token", "aggregate": "token-mean", "backend": backend}
    got = run(x, dual_clip=3.0, **plain)
    near(got["loss"], 6.0)
    near(got["dlogprob"], [0.0])
    near(run(x, **plain)["dlogprob"], [10.0])


@pytest.mark.parametrize("ratio", ["sequence", "token"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_reference_gradcheck(ratio, kl):
    x, cu, mask = tokens(dtype=torch.float64, lengths=(4, 0, 3, 5))
    old = x["old_logprob"]

    def loss(new, entropy):
        options = FULL | WIDE[ratio] | {"cu_seqlens": cu, "mask": mask, "ratio": ratio, "kl": kl}
        rest = {"ref_logprob": x["ref_logprob"], "correction": x["correction"]}
        out = reference.clipped_surrogate(
            new, old, x["advantage"], entropy=entropy, **rest, **options
        )
        return out.loss

    leaves = (x["logprob"].requires_grad_(), x["entropy"].requires_grad_())
    assert torch.autograd.gradcheck(loss, leaves)


LOG_RATIO = torch.cat((torch.linspace(-25, 25, 401), torch.linspace(-1, 1, 401))).double()


def token_ratio(x):
    y, inside = held(x, 20.0)
    return y.exp(), y.exp() * inside


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "cispo"])  # whose weight is constant
def test_the_slope_of_a_loss_is_that_of_its_value(name):
    for a in (-1.5, 0.7):
        x = LOG_RATIO.clone().requires_grad_()
        settings = LOSSES[name].settings("token") | ({"dual_clip": 2.0} if name == "clip" else {})
        term = LOSSES[name].term(x, torch.full_like(x, a), x - 1, token_ratio, **settings)
        (expected,) = torch.autograd.grad(term.value.sum(), x)
        torch.testing.assert_close(term.slope, expected)
        assert (expected != 0).any()
        assert name == "sapo" or torch.equal(term.slope == 0, expected == 0), "no underflow there"


def test_the_clip_is_the_textbook_line():
    for a in (-1.5, 0.7):
        r, advantage = LOG_RATIO.clamp(-20, 20).exp(), torch.full_like(LOG_RATIO, a)
        settings = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 2.0}
        got = LOSSES["clip"].term(LOG_RATIO, advantage, LOG_RATIO, token_ratio, **settings).value
        textbook = -torch.minimum(r * advantage, r.clamp(0.8, 1.28) * advantage)
        if a < 0:
            textbook = torch.minimum(textbook, -advantage * 2.0)
        torch.testing.assert_close(got, textbook)


@pytest.mark.parametrize("name", [n for n in KL if n != "k3+"])  # whose gradient is another's
def test_the_slope_of_a_divergence_is_that_of_its_value(name):
    lp = LOG_RATIO.clone().requires_grad_()
    u, inside = held(0.3 - 0.7 * LOG_RATIO - lp, 20.0)  # far u where r is far, and the other way
    value, slope = KL[name](u, -inside, lambda: token_ratio(lp))
    (expected,) = torch.autograd.grad(value.sum(), lp)
    torch.testing.assert_close(slope, expected)
    assert name == "k1" or (value >= 0).all()


def test_sequence_logprob(device):
    x, cu, mask = tokens(device, dtype=torch.float64)
    new = x["logprob"].requires_grad_()
    for reduce in ("sum", "mean"):
        got = sequence_logprob(new, cu_seqlens=cu, mask=mask, reduce=reduce)
        for i, (a, b) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
            row = new[a:b][mask[a:b]]
            expected = row.sum() if reduce == "sum" or len(row) == 0 else row.mean()
            torch.testing.assert_close(got[i], expected)
        assert torch.autograd.gradcheck(
            lambda y, r=reduce: sequence_logprob(y, cu_seqlens=cu, mask=mask, reduce=r), new
        )
        same = sequence_logprob(
            padded(new, cu), mask=padded(mask.double(), cu, fill=0.0), reduce=reduce
        )
        torch.testing.assert_close(same, got)
    assert sequence_logprob(new.bfloat16(), cu_seqlens=cu).dtype == torch.float32
    with pytest.raises(ValueError, match="cu_seqlens"):
        sequence_logprob(new)
    with pytest.raises(ValueError, match="reduce"):
        sequence_logprob(new, cu_seqlens=cu, reduce="max")

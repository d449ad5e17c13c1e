"""riskpo_kernels.risk: hand-worked numbers, the loops of the reference, and the gradient fact."""

import itertools

import pytest
import torch

from riskpo_kernels import reference, risk
from tests import golden_risk as gold

TOL = dict(rtol=0, atol=2e-6)  # the hand-worked numbers are rounded to six digits
FORMS = ("paper", "official", "seeking", "mean")


def t(x):
    return torch.tensor(x, dtype=torch.float64)


def assert_near(got, want, **tol):
    torch.testing.assert_close(
        torch.as_tensor(got).double(), torch.as_tensor(want).double(), **(tol or TOL)
    )


@pytest.mark.parametrize("case", gold.MEASURES)
def test_measures_of_known_scores(case):
    scores, q_alpha, q_beta, tail, middle, mixed = gold.MEASURES[case]
    tracker = risk.QuantileTracker()
    tracker.update(t(scores))
    assert_near(tracker.values, t([q_alpha, q_beta]))
    assert_near(risk.rvar(t(scores), 0.0, 0.2), tail)
    assert_near(risk.cvar(t(scores), 0.2), tail)
    assert_near(risk.rvar(t(scores), 0.2, 0.8), middle)
    assert_near(risk.mvar(t(scores), 0.2, 0.8, 0.5), mixed)


@pytest.mark.parametrize("case", gold.MONITOR)
def test_monitor_of_known_scores(case):
    scores, q_alpha, q_beta, *want = gold.MONITOR[case]
    assert_near(torch.stack(risk.official_monitor(t(scores), q_alpha, q_beta)), t(want))


def test_monitor_falls_back_to_the_mean_of_all():
    got = risk.official_monitor(t([1.0, 3.0]), 0.0, 0.5)
    assert_near(torch.stack(got), t([2.0, 2.0, 2.0]))


@pytest.mark.parametrize("options, want", gold.ADVANTAGES)
def test_advantages_of_known_scores(options, want):
    got = risk.mvar_advantage(t(gold.RANGE_0_5), 1.0, 4.0, **options)
    assert_near(got, t(want), rtol=0, atol=1e-6)


@pytest.mark.parametrize("natural", [True, False])
def test_advantages_over_std(natural):
    scores = t(gold.RANGE_0_5)
    assert_near(scores.std(), gold.STD_0_5)
    a = risk.mvar_advantage(scores, 1.0, 4.0, form="official", natural=natural, eps=1e-6)
    assert_near(a / (scores.std() + 1e-6), t(gold.OVER_STD[natural]))


@pytest.mark.parametrize("options, over_std, want", gold.FIVE_ADVANTAGES)
def test_advantages_with_a_bundles_own_quantiles(options, over_std, want):
    scores, q_alpha, q_beta, *_ = gold.MEASURES["five"]
    a = risk.mvar_advantage(t(scores), q_alpha, q_beta, **options)
    assert_near(t(scores).std(), gold.FIVE_STD)
    assert_near(a / (t(scores).std() + 1e-6) if over_std else a, t(want))


def test_rewards_of_both_signs_give_the_same_normalised_advantage():
    scores, q_alpha, q_beta, *_ = gold.MEASURES["five"]
    for s, lo, hi in ((t(scores), q_alpha, q_beta), (2 * t(scores) - 5, 2 * q_alpha - 5, -0.6)):
        a = risk.mvar_advantage(s, lo, hi, form="official") / s.std()
        assert_near(a, t(gold.FIVE_NO_EPS_OVER_STD))


@pytest.mark.parametrize("settings", gold.EQUIVALENT_OMEGA)
def test_official_form_is_the_paper_form_at_another_omega(settings):
    alpha, beta, w_mix = settings
    omega, scale = w_mix * (beta - alpha) / alpha - 1, 1 / ((1 + w_mix) * (beta - alpha))
    assert_near(t([omega, scale]), t(gold.EQUIVALENT_OMEGA[settings]))
    scores = torch.randn(4, 7, dtype=torch.float64)
    levels = dict(alpha=alpha, beta=beta)
    a = risk.mvar_advantage(scores, -0.3, 0.6, form="official", w_mix=w_mix, **levels)
    b = risk.mvar_advantage(scores, -0.3, 0.6, form="paper", omega=omega, **levels)
    assert_near(a, scale * b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("levels", gold.W_MIX_OF_OMEGA_HALF)
def test_w_mix_that_reproduces_the_papers_omega(levels):
    alpha, beta = levels
    w_mix = gold.W_MIX_OF_OMEGA_HALF[levels]
    scores = torch.arange(6.0)
    options = dict(alpha=alpha, beta=beta, w_mix=w_mix, omega=0.5)
    a = risk.mvar_advantage(scores, 1.0, 4.0, form="official", **options)
    b = risk.mvar_advantage(scores, 1.0, 4.0, form="paper", **options)
    assert_near(a * (1 + w_mix) * (beta - alpha), b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", gold.ALL_WRONG)
def test_all_wrong_bundle_beside_tracked_quantiles(form):
    a = risk.mvar_advantage(torch.zeros(5), 1.0, 4.0, form=form, eps=1e-6)
    assert_near(a, torch.full((5,), gold.ALL_WRONG[form]))


@pytest.mark.parametrize("p_wrong", gold.SINGLE)
def test_single_question_bundles(p_wrong):
    q_alpha, q_beta, *want = gold.SINGLE[p_wrong]
    assert_near(risk.mvar_advantage(t([0.0, 1.0]), q_alpha, q_beta), t(want))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("natural", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_advantage_matches_reference(form, natural, eps):
    options = dict(form=form, natural=natural, eps=eps, alpha=0.3, beta=0.9, omega=0.7, w_mix=1.1)
    scores = torch.randint(-2, 6, (6, 5)).double() + torch.rand(6, 5).round().double() / 3
    per_bundle = torch.quantile(scores, t([0.3, 0.9]), dim=1, keepdim=True)
    for lo, hi in [(0.3, 2.7), (2.0, 1.0), (t(0.5), t([2.5])), tuple(per_bundle)]:
        got = risk.mvar_advantage(scores, lo, hi, **options)
        want = reference.mvar_advantage(scores, lo, hi, **options)
        assert_near(got, want, rtol=1e-12, atol=1e-12)


def test_measures_match_reference():
    levels = [0.0, 0.13, 0.2, 0.5, 0.77, 1.0]
    for n in (1, 2, 5, 13):
        scores = torch.randint(0, 4, (2, 3, n)).double()
        for a, b in itertools.combinations(levels, 2):
            got, want = risk.rvar(scores, a, b), reference.rvar(scores, a, b)
            assert_near(got, want, rtol=1e-12, atol=1e-12)
            if a > 0:
                got, want = risk.mvar(scores, a, b, 0.7), reference.mvar(scores, a, b, 0.7)
                assert_near(got, want, rtol=1e-12, atol=1e-12)
        assert_near(risk.cvar(scores, 0.4), reference.cvar(scores, 0.4), rtol=1e-12, atol=1e-12)
        quantiles = torch.quantile(scores, t([0.2, 0.8]), dim=-1, keepdim=True)
        got = torch.stack(risk.official_monitor(scores, *quantiles, w_mix=0.8))
        want = torch.stack(reference.official_monitor(scores, *quantiles, w_mix=0.8))
        assert_near(got, want, rtol=1e-12, atol=1e-12)


def test_special_cases_of_mvar():
    scores = torch.randn(3, 11, dtype=torch.float64)
    assert_near(risk.mvar(scores, 0.3, 1.0, 0.0), scores.mean(-1), rtol=1e-12, atol=1e-12)
    assert_near(risk.cvar(scores, 1.0), scores.mean(-1), rtol=1e-12, atol=1e-12)
    split = 0.8 * risk.cvar(scores, 0.8) + 0.5 * 0.3 * risk.cvar(scores, 0.3)
    assert_near(risk.mvar(scores, 0.3, 0.8, 0.5), split, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("natural", [True, False])
def test_shift_and_scale(form, natural):
    scores = torch.randn(4, 6, dtype=torch.float64)
    options = dict(form=form, natural=natural)
    a = risk.mvar_advantage(scores, -0.4, 0.5, **options)
    if form != "mean" or natural:
        shifted = risk.mvar_advantage(scores + 3, 2.6, 3.5, **options)
        assert_near(shifted, a, rtol=1e-12, atol=1e-12)
    scaled = risk.mvar_advantage(2.5 * scores, -1.0, 1.25, **options)
    assert_near(scaled, 2.5 * a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["paper", "official"])
def test_averse_advantages_stop_at_the_upper_quantile(form):
    scores = torch.randn(200)
    a = risk.mvar_advantage(scores, -0.5, 0.5, form=form)
    above = scores >= 0.5
    assert 20 < above.sum() < 180
    assert (a[above] == 0).all() and (a[~above] < 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_narrow_types_compute_in_float32(dtype):
    scores = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    a = risk.mvar_advantage(scores, 0.25, 0.75)
    assert a.dtype == torch.float32
    assert_near(a, risk.mvar_advantage(scores.float(), 0.25, 0.75))
    assert risk.rvar(scores, 0.2, 0.8).dtype == torch.float32
    assert risk.bundle_scores(scores, 2).tolist() == [scores.float().sum(0).tolist()]


def test_measures_are_differentiable_and_advantages_detached():
    scores = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: risk.mvar(s, 0.3, 0.8, 0.5), scores)
    assert not risk.mvar_advantage(scores, 0.0, 1.0).requires_grad


def population_mvar(values, pmf, alpha, beta, omega):
    """MVaR of a discrete distribution by its quantile function, piece by piece."""
    total, left = 0.0, 0.0
    for value, p in sorted(zip(values, pmf, strict=True)):
        right = left + p
        tail = max(0.0, min(right, alpha) - left)
        middle = max(0.0, min(right, beta) - max(left, alpha))
        total, left = total + value * ((1 + omega) * tail + middle), right
    return total


def test_score_function_gradient_is_the_gradient_of_mvar_categorical():
    z, risk_of = t(gold.CATEGORICAL_P).log(), (0.25, 0.8, 0.5)
    values = gold.RANGE_0_5

    def objective(logits):
        return population_mvar(values, logits.softmax(0).tolist(), *risk_of)

    options = dict(alpha=0.25, beta=0.8, omega=0.5)
    a = risk.mvar_advantage(t(values), *gold.CATEGORICAL_QUANTILES, **options)
    p = z.softmax(0)
    gradient = p * (a - (p * a).sum())  # sum_r p_r A(r) d ln p_r / dz
    assert_near(a, t(gold.CATEGORICAL_ADVANTAGE))
    assert_near(gradient, t(gold.CATEGORICAL_GRADIENT))
    assert_near(objective(z), gold.CATEGORICAL_MVAR)
    h = 1e-5
    differences = [(objective(z + h * e) - objective(z - h * e)) / (2 * h) for e in torch.eye(6)]
    assert_near(gradient, t(differences), rtol=0, atol=1e-8)
    counts = (20 * t(gold.CATEGORICAL_P)).round().long()  # the same distribution as a sample
    assert_near(risk.mvar(t(values).repeat_interleave(counts), *risk_of), gold.CATEGORICAL_MVAR)


@pytest.mark.parametrize("rates, pmf, q_alpha, q_beta, mvar, slope", gold.BERNOULLI)
def test_score_function_gradient_is_the_gradient_of_mvar_bundle(
    rates, pmf, q_alpha, q_beta, mvar, slope
):
    answers = list(itertools.product((0.0, 1.0), repeat=len(rates)))

    def probabilities(logits):
        p = logits.sigmoid()
        return torch.stack([torch.where(t(y) == 1, p, 1 - p).prod() for y in answers])

    def objective(logits):
        chances = probabilities(logits).tolist()
        return population_mvar([sum(y) for y in answers], chances, 0.2, 0.8, 0.5)

    z, outcomes = torch.logit(t(rates)), t(answers)
    chances, scores = probabilities(z), outcomes.sum(1)
    assert_near(torch.stack([chances[scores == r].sum() for r in range(len(pmf))]), t(pmf))
    a = risk.mvar_advantage(scores, q_alpha, q_beta)
    gradient = (chances * a) @ (outcomes - t(rates))
    assert_near(objective(z), mvar)
    assert_near(gradient, t(slope), rtol=0, atol=6e-6)
    h, unit = 1e-5, torch.eye(len(rates))
    differences = [(objective(z + h * e) - objective(z - h * e)) / (2 * h) for e in unit]
    assert_near(gradient, t(differences), rtol=0, atol=1e-8)
    counts = (10_000 * t(pmf)).round().long()
    sample = torch.arange(len(pmf)).double().repeat_interleave(counts)
    assert_near(risk.mvar(sample, 0.2, 0.8, 0.5), mvar)


NAN = torch.tensor([0.0, float("nan")])
BAD = {
    "empty range": (lambda: risk.rvar(torch.rand(3), 0.5, 0.5), "a=0.5, b=0.5"),
    "level above 1": (lambda: risk.cvar(torch.rand(3), 1.2), "a=1.2"),
    "level text": (lambda: risk.cvar(torch.rand(3), "half"), "numbers"),
    "nan level": (lambda: risk.rvar(torch.rand(3), float("nan"), 0.5), "a=nan"),
    "nan score": (lambda: risk.rvar(NAN, 0.0, 0.5), "NaN"),
    "infinite score": (lambda: risk.mvar(torch.tensor([1.0, torch.inf]), 0.2, 0.8, 0.5), "finite"),
    "no scores": (lambda: risk.rvar(torch.rand(3, 0), 0.0, 0.5), "at least one"),
    "a list": (lambda: risk.rvar([1.0], 0.0, 0.5), "list"),
    "negative omega": (lambda: risk.mvar(torch.rand(3), 0.2, 0.8, -1.0), "omega=-1.0"),
    "alpha zero": (lambda: risk.mvar(torch.rand(3), 0.0, 0.8, 0.5), "alpha=0"),
    "form": (lambda: risk.mvar_advantage(torch.rand(3), 0, 1, form="risky"), "form='risky'"),
    "tiny alpha": (
        lambda: risk.mvar_advantage(torch.rand(3), 0, 1, form="official", alpha=1e-4),
        "alpha=0.0001",
    ),
    "seeking beta": (
        lambda: risk.mvar_advantage(torch.rand(3), 0, 1, form="seeking", beta=1.0),
        "beta < 1",
    ),
    "negative eps": (lambda: risk.mvar_advantage(torch.rand(3), 0, 1, eps=-1e-6), "eps"),
    "nan quantile": (lambda: risk.mvar_advantage(torch.rand(3), float("nan"), 1), "q_alpha=nan"),
    "bare bundle quantiles": (
        lambda: risk.mvar_advantage(torch.rand(3, 3), torch.rand(3), 1.0),
        r"q_alpha\[:, None\]",
    ),
    "quantiles too many": (
        lambda: risk.mvar_advantage(torch.rand(3, 3), 0.0, torch.rand(2, 1)),
        r"q_beta of shape \[2, 1\]",
    ),
    "leftover": (lambda: risk.bundle_scores(torch.rand(7, 3), 3), "Leave out 1"),
    "bundle size": (lambda: risk.bundle_scores(torch.rand(6, 3), 0), "bundle_size=0"),
    "flat rewards": (lambda: risk.bundle_scores(torch.rand(6), 3), r"\[Q, G\]"),
    "permutation type": (
        lambda: risk.bundle_scores(torch.rand(2, 3), 2, permutation=torch.rand(2, 3)),
        "permutation = float32",
    ),
    "permutation shape": (
        lambda: risk.bundle_scores(torch.rand(2, 3), 2, permutation=torch.arange(3)[None]),
        r"permutation of shape \[1, 3\]",
    ),
    "no permutation": (
        lambda: risk.bundle_scores(torch.rand(1, 3), 1, permutation=torch.tensor([[0, 0, 2]])),
        "repeats",
    ),
    "k above n": (lambda: risk.pass_at_k(4, 2, 5), "k=5"),
    "k zero": (lambda: risk.pass_at_k(4, 2, 0), "k=0"),
    "c above n": (lambda: risk.pass_at_k(4, torch.tensor([2, 5]), 2), "c <= n"),
    "fractional c": (lambda: risk.pass_at_k(4, 1.5, 2), "1.5"),
    "no levels": (lambda: risk.QuantileTracker(()), "levels"),
    "falling levels": (lambda: risk.QuantileTracker((0.8, 0.2)), "levels"),
    "step": (lambda: risk.QuantileTracker(step=0.0), "step=0.0"),
    "no update yet": (lambda: risk.QuantileTracker().values, "update"),
    "nan update": (lambda: risk.QuantileTracker().update(NAN), "NaN"),
}


@pytest.mark.parametrize("case", BAD)
def test_rejects(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()

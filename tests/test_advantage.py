"""RiskPOAdvantage: worked numbers, and the loops of the reference."""

import itertools
import random
import warnings

import pytest
import torch

from riskpo_kernels import RiskPOAdvantage, reference
from riskpo_kernels.advantages.credit import CREDITS
from tests import golden_risk as gold

TOL = dict(rtol=0, atol=2e-6)
# Saved runs resume with these: the seeded order may never change.
PINNED = [["i:4", "i:6", "i:7", "i:5", "i:3", "i:2", "i:1", "i:0"], [5, 0, 2, 3, 4, 1]]


def t(x):
    return torch.tensor(x, dtype=torch.float64)


def flat(rewards):
    """A [Q][G] table as rows that interleave the questions: (rewards [N], question_id [N])."""
    r = t(rewards)
    return r.T.reshape(-1), torch.arange(r.shape[0]).repeat(r.shape[1])


def table(advantage, questions):
    return advantage.double().reshape(-1, questions).T


def batch(questions=6, draws=4, kind="binary", seed=0):
    g = torch.Generator().manual_seed(seed)
    r = torch.rand(questions * draws, generator=g, dtype=torch.float64)
    if kind == "binary":
        r = (r < 0.5).double()
    ids = torch.arange(questions).repeat_interleave(draws)
    order = torch.randperm(questions * draws, generator=g)
    return r[order], ids[order]


def assert_same(got, want, **tol):
    torch.testing.assert_close(got[0], want[0], **(tol or dict(rtol=1e-5, atol=1e-6)))
    assert got[1].keys() == want[1].keys()
    for name in got[1]:
        assert got[1][name] == pytest.approx(want[1][name], rel=1e-9, abs=1e-9), name


# --- worked numbers


@pytest.mark.parametrize("credit, natural", gold.CREDIT)
@pytest.mark.parametrize("module", [RiskPOAdvantage, reference.RiskPOAdvantage])
def test_credit_of_known_rewards(module, credit, natural):
    baseline = "natural" if natural else "none"
    make = module("official-hard", bundle_size=2, credit=credit, baseline=baseline)
    advantage, stats = make(*flat(gold.CREDIT_REWARDS), step=0)
    want = t(gold.CREDIT[credit, natural])
    torch.testing.assert_close(table(advantage, 2), want, **TOL)
    assert (stats["q_alpha"], stats["q_beta"]) == pytest.approx(gold.CREDIT_QUANTILES)
    assert stats["bundle_score_std"] == pytest.approx(1.0)


def test_presets_are_the_rows_that_were_released():
    easy, hard = RiskPOAdvantage("official-easy"), RiskPOAdvantage("official-hard")
    as_hard = RiskPOAdvantage(
        "official-easy", credit="sum-mean", beta=0.8, baseline="none", quantiles="bundle"
    )
    assert as_hard.settings == hard.settings
    assert (easy.settings.beta, easy.settings.credit) == (0.9, "std")
    assert easy.settings.baseline == "natural" and easy.settings.w_mix == 1.5
    paper = RiskPOAdvantage().settings
    assert (paper.alpha, paper.beta, paper.omega, paper.bundle_size) == (0.2, 0.8, 0.5, 5)
    assert paper.quantiles == "tracked" and paper.pairing == "permuted"


def test_sum_mean_turns_the_sign_of_right_answers():
    make = RiskPOAdvantage("official-hard")
    advantage, stats = make(*flat(gold.INVERTED_REWARDS), step=0)
    got = table(advantage, 5)
    torch.testing.assert_close(got, t(gold.INVERTED_CREDIT), **TOL)
    torch.testing.assert_close(got.sum(0), t(gold.INVERTED_BUNDLE), rtol=0, atol=6e-6)
    assert (stats["q_alpha"], stats["q_beta"]) == pytest.approx(gold.INVERTED_QUANTILES)
    assert (got[t(gold.INVERTED_REWARDS) > 0] < 0).any()


def test_sum_mean_of_a_centred_advantage_is_centring_per_question():
    r = t(gold.CREDIT_REWARDS)
    a = 0.7 * (r.sum(0, keepdim=True) - r.sum(0).mean())
    got = CREDITS["sum-mean"](a, r[None], 0.0)[0]
    torch.testing.assert_close(got, t(gold.CENTRED_CREDIT), **TOL)
    shares = CREDITS["sum-mean"](torch.randn(3, 4).double(), torch.rand(3, 5, 4).double(), 0.0)
    assert shares.shape == (3, 5, 4)


def test_sum_mean_shares_add_up():
    a, r = torch.randn(6, 4).double(), (torch.rand(6, 5, 4) < 0.4).double()
    total = (r - r.mean(-1, keepdim=True)).sum(1).abs()
    assert (total < 1e-6).any() and (total > 1e-6).any(), "both branches have to be seen"
    torch.testing.assert_close(CREDITS["sum-mean"](a, r, 0.0).sum(1), a)


@pytest.mark.parametrize("n", gold.RARE_SUCCESS)
@pytest.mark.parametrize("natural", [True, False])
def test_one_success_among_failures(n, natural):
    quantiles, std, *values = gold.RARE_SUCCESS[n]
    baseline = "natural" if natural else "none"
    make = RiskPOAdvantage("official-hard", bundle_size=1, credit="uniform", baseline=baseline)
    advantage, stats = make(*flat([[0.0] * (n - 1) + [1.0]]), step=0)
    wrong, right = values[0 if natural else 1]
    torch.testing.assert_close(advantage.double(), t([wrong] * (n - 1) + [right]), **TOL)
    assert (stats["q_alpha"], stats["q_beta"]) == pytest.approx(quantiles)
    assert stats["bundle_score_std"] == pytest.approx(std, abs=1e-6)


def test_all_wrong_bundle_depends_on_whose_quantiles():
    other, silent = [[1.0, 0, 1, 1]] * 5, [[0.0] * 4] * 5
    rewards = flat(silent + other)
    own, _ = RiskPOAdvantage("official-hard")(*rewards, step=0)
    assert (table(own, 10)[:5] == 0).all()
    pooled, stats = RiskPOAdvantage("paper", pairing="index")(*rewards, step=0)
    want = -1.5 * stats["q_alpha"] - (stats["q_beta"] - stats["q_alpha"])
    assert want < -1
    torch.testing.assert_close(table(pooled, 10)[:5], torch.full((5, 4), want).double())


def test_rewards_of_both_signs_give_the_same_normalised_advantage():
    r, ids = batch(10, 5)
    make = dict(eps=0.0, credit="uniform")
    a, _ = RiskPOAdvantage("official-hard", **make)(r, ids, step=0)
    b, _ = RiskPOAdvantage("official-hard", **make)(2 * r - 1, ids, step=0)
    assert (a != 0).any()
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("questions, size", gold.BUNDLES)
def test_bundle_counts_and_leftovers(questions, size):
    bundles, last = gold.BUNDLES[questions, size]
    r, ids = batch(questions, 2)
    make = RiskPOAdvantage(bundle_size=size, leftover="drop")
    if last < size:
        with pytest.warns(UserWarning, match=f"{last} get advantage 0"):
            advantage, stats = make(r, ids, step=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make(r, ids, step=1)  # warned once only
        with pytest.raises(ValueError, match=f"{questions} questions with bundle_size={size}"):
            RiskPOAdvantage(bundle_size=size)(r, ids, step=0)
    else:
        advantage, stats = make(r, ids, step=0)
    assert stats["bundles"] == bundles - (last < size)
    assert stats["dropped_questions"] == last % size


def test_dropped_questions_stay_out_of_the_tracker():
    r, ids = batch(6, 3)
    kept, left = r.clone(), ids == ids.max()
    kept[left] = 100.0
    make = RiskPOAdvantage(bundle_size=5, leftover="drop", pairing="index")
    order = torch.argsort(ids, stable=True)  # the last question to appear is the one left over
    with pytest.warns(UserWarning):
        advantage, stats = make(kept[order], ids[order], step=0)
    assert (advantage[left[order]] == 0).all() and (advantage[~left[order]] != 0).any()
    alone, want = RiskPOAdvantage(bundle_size=5, pairing="index")(
        r[order][~left[order]], ids[order][~left[order]], step=0
    )
    assert torch.equal(advantage[~left[order]], alone)
    assert (stats["q_alpha"], stats["mvar"]) == (want["q_alpha"], want["mvar"])


# --- op against reference


def allowed(o):
    """The combinations the op does not refuse."""
    if o["scale"] != "bundle-std" or o["baseline"] == "leave-one-out":
        return True
    if o["form"] == "mean":
        return o["baseline"] == "natural"
    return o["quantiles"] == "bundle" and o["baseline"] in ("natural", "none")


GRID = dict(
    credit=("uniform", "score", "std", "sum-mean"),
    baseline=("natural", "none", "leave-one-out", "batch"),
    scale=("none", "bundle-std", "batch-std"),
    pairing=("permuted", "index"),
    quantiles=("tracked", "bundle", "mix"),
)


@pytest.mark.parametrize("form", ["paper", "official", "seeking", "mean"])
def test_every_combination_matches_reference(form):
    rng, compared = random.Random(form), 0
    for values in itertools.product(*GRID.values()):
        o = dict(zip(GRID, values, strict=True), form=form)
        o |= dict(bundle_size=2, seed=rng.randrange(9), eps=rng.choice([0.0, 1e-6]))
        o |= dict(alpha=0.25, beta=0.7, omega=rng.random(), w_mix=rng.random() + 0.5)
        if not allowed(o):
            with pytest.raises(ValueError, match="scale='bundle-std'"):
                RiskPOAdvantage(**o)
            continue
        op, slow = RiskPOAdvantage(**o), reference.RiskPOAdvantage(**o)
        for step in range(2):
            r, ids = batch(4, 3, rng.choice(["binary", "real"]), seed=rng.randrange(10**6))
            assert_same(op(r, ids, step=step), slow(r, ids, step=step))
        compared += 1
    assert compared == (240 if form == "mean" else 232)


@pytest.mark.parametrize("preset", ["paper", "official-easy", "official-hard"])
def test_presets_match_reference_over_many_steps(preset):
    op, slow = RiskPOAdvantage(preset), reference.RiskPOAdvantage(preset)
    for step in range(6):
        r, ids = batch(10, 5, seed=step)
        assert_same(op(r, ids, step=step), slow(r, ids, step=step))


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("preset", ["paper", "official-easy", "official-hard"])
def test_few_responses_match_reference(preset, draws):
    r, ids = batch(10, draws)
    op, slow = RiskPOAdvantage(preset), reference.RiskPOAdvantage(preset)
    expected = slow(r, ids, step=0)
    if draws == 1 and preset != "paper":  # the bundle's own quantiles are its one score
        assert not torch.as_tensor(expected[0]).any()
        with pytest.raises(ValueError, match="1 response per question"):
            op(r, ids, step=0)
        return
    assert_same(op(r, ids, step=0), expected)


def test_stats_name_what_the_contract_names():
    r, ids = batch(10, 3)
    advantage, stats = RiskPOAdvantage()(r, ids, step=0)
    assert all(type(x) is float for x in stats.values())
    assert stats["zero_advantage_fraction"] == (advantage == 0).double().mean().item()
    by_question = torch.stack([r[ids == q] for q in range(10)])
    alike = (by_question.std(1) == 0).double().mean().item()
    assert stats["all_equal_question_fraction"] == alike > 0
    assert stats["advantage_min"] == pytest.approx(advantage.min().item())

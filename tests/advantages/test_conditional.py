"""Conditional credit and matched bundles: against brute force, and the claims of docs/risk.md."""

import itertools
import json
import random

import pytest
import torch

from riskpo_kernels import RiskPOAdvantage, bundle_scores, mvar_advantage, reference
from riskpo_kernels.advantages import conditional
from tests.test_advantage import assert_same, batch

OPTIONS = [
    dict(credit="conditional"),
    dict(credit="conditional", baseline="leave-one-out"),
    dict(credit="conditional", baseline="batch", scale="batch-std"),
    dict(credit="conditional", form="seeking", baseline="none", pairing="index"),
    dict(credit="conditional", form="mean", baseline="leave-one-out"),
    dict(bundling="matched", difficulty="prior"),
    dict(bundling="matched", difficulty="history", baseline="leave-one-out"),
    dict(credit="conditional", bundling="matched", difficulty="prior", baseline="leave-one-out"),
    dict(credit="conditional", bundling="matched", difficulty="history"),
    dict(credit="conditional", bundling="matched", difficulty="cross-fit"),
    dict(
        credit="conditional", bundling="matched", difficulty="cross-fit", baseline="leave-one-out"
    ),
]


def rewards_of(kind, seed):
    r, ids = batch(questions=7, draws=5, kind="binary" if kind == "binary" else "any", seed=seed)
    return (r * 4).round() / 4 if kind == "quarters" else r, ids


@pytest.mark.parametrize("kind", ["binary", "quarters", "any"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_like_brute_force_over_steps(options, kind):
    """Tracked quantiles, history and dropped questions included; each step twice."""
    settings = dict(bundle_size=3, leftover="drop", alpha=0.3, beta=0.7, seed=5) | options
    ours, theirs = RiskPOAdvantage(**settings), reference.RiskPOAdvantage(**settings)
    for step in (0, 1, 1, 4):
        r, ids = rewards_of(kind, step)
        given = {"prior": torch.tensor([0.3, 0.1, 0.9, 0.2, 0.5, 0.4, 0.8])[ids]}
        given = given if settings.get("difficulty") == "prior" else {}
        with pytest.warns(UserWarning) if step == 0 else pytest.MonkeyPatch.context():
            got = ours(r, ids, step=step, **given)
        want = theirs(r, ids, step=step, **given)
        assert got[1]["dropped_questions"] == 1
        assert got[0].abs().max() > 0
        assert_same(got, want)


def fixed(q_alpha, q_beta, **options):
    """An advantage whose tracked quantiles are these, whatever it sees at step 1."""
    a = RiskPOAdvantage(**options)
    state = a.state_dict()
    state["tracker"]["quantiles"] = [q_alpha, q_beta]
    a.load_state_dict(state)
    return a


P = (0.15, 0.5, 0.6, 0.9)  # of being right, by question; G = 2, B = 2


def outcomes(p=P, draws=2):
    """Every table of rewards [Q, G] with its probability."""
    for bits in itertools.product((0.0, 1.0), repeat=len(p) * draws):
        r = torch.tensor(bits, dtype=torch.float64).view(len(p), draws)
        odds = torch.tensor(p, dtype=torch.float64)[:, None]
        yield r, float(torch.where(r > 0, odds, 1 - odds).prod())


def gradient(advantage, r, p=P):
    """Per question: mean of advantage times the score of a Bernoulli policy, d log p / d logit."""
    return (advantage * (r - torch.as_tensor(p, dtype=torch.float64)[:, None])).mean(1)


def slope(p_other, q):
    """w = E[A(S + 1) - A(S)] with S one fresh response of the other question."""
    s = torch.tensor([0.0, 1.0], dtype=torch.float64)
    a = mvar_advantage(torch.cat([s + 1, s]), *q, natural=False)
    return float((a[:2] - a[2:]) @ torch.tensor([1 - p_other, p_other], dtype=torch.float64))


QUANTILES = (0.7, 1.6)
PQ = torch.tensor([x * (1 - x) for x in P], dtype=torch.float64)


def test_random_bundles_give_every_question_the_same_weight():
    """The published form in expectation over rewards, bundles and papers: RLOO with one weight.

    Each question's weight is the mean slope over its possible partners, all questions but itself.
    """
    total = torch.zeros(4, dtype=torch.float64)
    bundlings = [(0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2)]
    for r, odds in outcomes():
        for order in bundlings:
            for swaps in itertools.product((0, 1), repeat=2):  # of one of the two in a bundle
                xi = torch.tensor([[0, 1]] * 4)
                xi[[order[0], order[2]]] = torch.tensor([[s, 1 - s] for s in swaps])
                scores = bundle_scores(r[list(order)], 2, permutation=xi[list(order)])
                a = mvar_advantage(scores, *QUANTILES, natural=True).repeat_interleave(2, 0)
                credit = torch.empty_like(r)
                credit[list(order)] = torch.empty_like(r).scatter(1, xi[list(order)], a)
                total += odds * gradient(credit, r) / (len(bundlings) * 4)
    partners = [[j for j in range(4) if j != i] for i in range(4)]
    weights = [sum(slope(P[j], QUANTILES) for j in js) / 3 for js in partners]
    torch.testing.assert_close(total, torch.tensor(weights, dtype=torch.float64) * PQ)


@pytest.mark.parametrize("questions", [10, 20, 40])
def test_weights_differ_by_one_over_q(questions):
    """What is left of a difference between questions: each is missing among its own partners."""
    p = torch.linspace(0.05, 0.95, questions).tolist()
    slopes = torch.tensor([slope(x, QUANTILES) for x in p])
    weights = (slopes.sum() - slopes) / (questions - 1)
    spread = slopes.max() - slopes.min()
    torch.testing.assert_close(weights.max() - weights.min(), spread / (questions - 1))


def selected(advantage, r, step=1, **given):
    """(gradient of each question, mean slope of the bundles that it was credited in)."""
    ids = torch.arange(4).repeat_interleave(2)
    if "prior" in given:
        given["prior"] = torch.as_tensor(given["prior"])[ids]
    groups = {f"i:{i}": [2 * i, 2 * i + 1] for i in range(4)}
    prior = {f"i:{i}": float(given["prior"][2 * i]) for i in range(4)} if given else None
    tables = advantage._tables(groups, r.flatten(), step, prior)
    weights = torch.zeros(4, dtype=torch.float64)
    for names, rows in tables:
        order = [int(name[2:]) for name in names]
        for a, b in zip(order[::2], order[1::2], strict=True):
            for own, other in ((a, b), (b, a)):
                weights[own] += slope(P[other], QUANTILES) * rows.shape[1] / 2
    a, _ = advantage(r.flatten(), ids, step=step, **given)
    return gradient(a.double().view(4, 2), r), weights


def bias(make):
    """Expected gradient over the one that the chosen bundles' own weights would give, minus 1."""
    got, want = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for r, odds in outcomes():
        g, w = make(r)
        got, want = got + odds * g, want + odds * w * PQ
    return got / want - 1


SOURCES = ("random", "history", "prior", "cross-fit")


@pytest.mark.parametrize("source", SOURCES)
def test_each_source_of_difficulty_is_unbiased(source):
    options = dict(credit="conditional", bundle_size=2, baseline="none")
    if source != "random":
        options |= dict(bundling="matched", difficulty=source)

    def make(r):
        advantage = fixed(*QUANTILES, **options)
        advantage._history.means = {"i:0": 0.2, "i:1": 0.9, "i:3": 0.8}  # wrong, and incomplete
        given = {"prior": [0.4, 0.1, 0.3, 0.2]} if source == "prior" else {}
        return selected(advantage, r, **given)

    assert bias(make).abs().max() < 1e-6


def test_the_rewards_themselves_are_a_biased_source():
    """Why no such choice is offered: bundles sorted by the rewards that are credited in them."""

    def make(r):
        advantage = fixed(
            *QUANTILES, credit="conditional", bundle_size=2, baseline="none",
            bundling="matched", difficulty="prior",
        )  # fmt: skip
        return selected(advantage, r, prior=r.mean(1).tolist())

    assert bias(make).abs().max() > 0.05
    with pytest.raises(ValueError, match="difficulty='rewards'.*'history', 'prior', 'cross-fit'"):
        RiskPOAdvantage(bundling="matched", difficulty="rewards")


@pytest.mark.parametrize("seed", range(4))
def test_less_variance_than_the_pairing_that_was_drawn(seed):
    """Of the per-question gradient, over 40 batches of binary rewards; both leave-one-out."""
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(20, generator=g, dtype=torch.float64)
    ids = torch.arange(20).repeat_interleave(8)
    found = {"uniform": [], "conditional": []}
    for credit, gradients in found.items():
        a = fixed(1.5, 3.5, credit=credit, baseline="leave-one-out", seed=seed)
        g = torch.Generator().manual_seed(seed)
        for step in range(40):
            r = (torch.rand(20, 8, generator=g, dtype=torch.float64) < p[:, None]).double()
            advantage, stats = a(r.flatten(), ids, step=step)
            gradients.append(gradient(advantage.double().view(20, 8), r, p))
        assert credit == "uniform" or 0.2 < stats["variance_removed"] < 1
    variance = {k: torch.stack(v).var(0).sum() for k, v in found.items()}
    assert variance["conditional"] < 0.8 * variance["uniform"]


def test_matched_bundles_weigh_hard_questions_more():
    """The slopes of A: 1 + omega below q_alpha, 1 between, 0 above q_beta."""
    g = torch.Generator().manual_seed(0)
    p = torch.linspace(0.02, 0.98, 40, dtype=torch.float64)
    ids = torch.arange(40).repeat_interleave(8)
    r = (torch.rand(40, 8, generator=g, dtype=torch.float64) < p[:, None]).double().flatten()
    for difficulty, given in (("prior", {"prior": p[ids]}), ("cross-fit", {}), ("history", {})):
        a = fixed(1.0, 4.0, credit="conditional", baseline="leave-one-out", bundling="matched",
                  difficulty=difficulty)  # fmt: skip
        a._history.means = {f"i:{i}": float(x) for i, x in enumerate(p)}
        _, stats = a(r, ids, step=1, **given)
        assert stats["weight_hard"] > 1.05 > 0.95 > stats["weight_easy"] < 0.75


@pytest.mark.parametrize("difficulty", ["history", "cross-fit"])
def test_rows_may_come_in_any_order(difficulty):
    draw = torch.arange(6).repeat(10)
    ids = torch.arange(10).repeat_interleave(6)
    r = torch.rand(60, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    want, got = (RiskPOAdvantage("matched", difficulty=difficulty) for _ in range(2))
    for step in range(3):
        order = list(range(60))
        random.Random(step).shuffle(order)
        a, stats = want(r, ids, step=step, draw=draw)
        b, others = got(r[order], ids[order], step=step, draw=draw[order])
        assert torch.equal(a[order], b) and stats == pytest.approx(others)
        r = r.roll(7)


def test_many_different_rewards_are_sampled_and_say_their_error(monkeypatch):
    r, ids = batch(questions=6, draws=8, kind="any", seed=2)
    options = dict(credit="conditional", bundle_size=6, quantiles="tracked", alpha=0.3, beta=0.7)
    exact, stats = RiskPOAdvantage(**options)(r, ids, step=0)
    assert stats["credit_error"] == 0  # 8^5 sums
    monkeypatch.setattr(conditional, "MAX_SUPPORT", 1000)
    again = [RiskPOAdvantage(**options)(r, ids, step=0) for _ in range(2)]
    assert torch.equal(again[0][0], again[1][0])
    error = again[0][1]["credit_error"]
    assert 0 < error < 0.05
    assert 0 < (again[0][0] - exact).abs().max() < 5 * error


def test_sums_that_differ_by_rounding_are_one_value():
    r = torch.tensor([[0.1, 0.2], [0.2, 0.1], [0.3, 0.3]], dtype=torch.float64)
    sums = conditional.sums_of_others(r, [0, 0, 0])
    torch.testing.assert_close(sums[2].values, torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64))
    assert sums[2].probs.tolist() == [0.25, 0.5, 0.25]


def test_history_is_saved_and_resumed():
    ids = [f"q{i}" for i in range(10) for _ in range(4)]
    steps = [torch.rand(40, generator=torch.Generator().manual_seed(i)).round() for i in range(6)]
    whole, first = RiskPOAdvantage("matched"), RiskPOAdvantage("matched")
    want = [whole(r, ids, step=i)[0] for i, r in enumerate(steps)]
    for i, r in enumerate(steps[:3]):
        first(r, ids, step=i)
    resumed = RiskPOAdvantage("matched")
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert torch.equal(resumed(steps[2], ids, step=2)[0], want[2])  # a retry moves nothing
    got = [resumed(r, ids, step=i)[0] for i, r in enumerate(steps[3:], 3)]
    assert all(torch.equal(a, b) for a, b in zip(got, want[3:], strict=True))
    fresh = RiskPOAdvantage("matched")
    assert not torch.equal(fresh(steps[5], ids, step=5)[0], want[5])
    old = {k: v for k, v in first.state_dict().items() if k not in ("history", "older")}
    RiskPOAdvantage("matched").load_state_dict(old)  # of a release without matched bundles


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(credit="conditional", quantiles="bundle"), "quantiles='bundle'"),
        (dict(credit="conditional", baseline="leave-one-out", scale="bundle-std"), "scale="),
        (dict(credit="conditional", form="mean"), "baseline='natural'"),
        (dict(bundling="matched", difficulty="cross-fit"), "credit='uniform'"),
        (dict(bundling="matched", history_rate=1.5), "history_rate=1.5"),
        (dict(bundling="sorted"), "bundling='sorted'"),
    ],
)
def test_settings_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        RiskPOAdvantage(**options)


def test_priors_that_cannot_be():
    a = RiskPOAdvantage("matched", difficulty="prior", bundle_size=2)
    r, ids = torch.tensor([0.0, 1, 1, 0]), [0, 0, 1, 1]
    for prior, said in (
        (None, "without a prior"),
        ([1.0, 1.0, 2.0], "3 values of prior"),
        ([1.0, 2.0, 3.0, 3.0], "question '0'"),
        ([1.0, 1.0, float("nan"), float("nan")], "question '1'"),
    ):
        with pytest.raises(ValueError, match=said):
            a(r, ids, step=0, prior=prior)
    with pytest.raises(ValueError, match="cross-fit' with 2 responses"):
        RiskPOAdvantage("matched", difficulty="cross-fit", bundle_size=2)(r, ids, step=0)

"""RiskPOAdvantage: what it promises besides its numbers: order, types, steps, resume, refusals."""

import json
import random
import subprocess
import sys

import pytest
import torch

from riskpo_kernels import RiskPOAdvantage, reference
from riskpo_kernels.reference.pairing import draw_permutation, question_order
from tests import golden_risk as gold
from tests.test_advantage import batch, flat, t, table

# Saved runs resume with these: the seeded order may never change.
PINNED = [["i:4", "i:6", "i:7", "i:5", "i:3", "i:2", "i:1", "i:0"], [5, 0, 2, 3, 4, 1]]


# --- what the order of rows, ids and processes may not change


def shuffled_with(make, r, ids, draw, order, **call):
    draw = None if draw is None else draw[order]
    advantage, stats = make(r[order], ids[order], draw=draw, **call)
    return torch.empty_like(advantage).index_copy_(0, order, advantage), stats


def test_any_row_order_gives_the_same_advantages_when_draws_are_named():
    r, ids = batch(20, 4, "real")
    draw = torch.zeros_like(ids)
    for q in range(20):
        draw[ids == q] = torch.randperm(4) * 3
    want = RiskPOAdvantage()(r, ids, draw=draw, step=3)
    for _ in range(5):
        order = torch.randperm(80)
        got = shuffled_with(RiskPOAdvantage(), r, ids, draw, order, step=3)
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-6)
        assert got[1] == pytest.approx(want[1])


def test_order_between_questions_does_not_matter():
    r, ids = batch(20, 4, "real")
    want = RiskPOAdvantage()(r, ids, step=3)
    for sort in (torch.argsort(ids, stable=True), torch.argsort((ids * 7) % 20, stable=True)):
        got = shuffled_with(RiskPOAdvantage(), r, ids, None, sort, step=3)
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-6)


def test_index_pairing_follows_first_appearance():
    rewards = t(gold.PAPER_REWARDS)[:4]
    r, ids = flat(rewards.tolist())
    make = dict(bundle_size=2, pairing="index", form="mean", baseline="none")
    a, _ = RiskPOAdvantage(**make)(r, ids, step=0)
    scores = t(gold.PAPER_SCORES)[:2]
    torch.testing.assert_close(table(a, 4), scores.repeat_interleave(2, 0))
    b, _ = RiskPOAdvantage(**make)(r, 3 - ids, step=0)  # names alone change nothing
    assert torch.equal(a, b)


def test_permuted_pairing_uses_every_response_once():
    make = dict(bundle_size=3, form="mean", baseline="none")
    values = 2.0 ** torch.arange(12).double()  # every sum tells its terms
    ids = torch.arange(6).repeat(2)
    a, _ = RiskPOAdvantage(**make)(values, ids, step=0)
    papers = sorted(set(a.tolist()))
    assert len(papers) == 4 and sum(papers) == values.sum()
    for row, total in enumerate(a.tolist()):
        members = [i for i in range(12) if int(total) >> i & 1]
        assert row in members and len({ids[i].item() for i in members}) == 3
    others = [RiskPOAdvantage(**make, seed=s)(values, ids, step=k)[0] for s, k in ((1, 0), (0, 1))]
    assert all(not torch.equal(a, b) for b in others)


def test_a_question_is_one_question_wherever_it_appears():
    r, ids = batch(5, 4)
    twice = torch.cat([r, 1 - r]), torch.cat([ids, ids])
    assert RiskPOAdvantage()(*twice, step=0)[1]["bundles"] == 1


def test_ids_may_be_ints_or_strings():
    r, ids = batch(5, 4, "real")
    want, _ = RiskPOAdvantage()(r, ids, step=0)
    for same in (ids.int(), ids.tolist(), tuple(ids), ids.numpy()):
        assert torch.equal(RiskPOAdvantage()(r, same, step=0)[0], want)
    names = [f"gsm8k/{i}\ud800é" for i in ids.tolist()]
    a, _ = RiskPOAdvantage(pairing="index")(r, names, step=0)
    b, _ = RiskPOAdvantage(pairing="index")(r, ids, step=0)
    assert torch.equal(a, b)
    RiskPOAdvantage()(r, names, step=0)


def test_pairing_is_the_same_everywhere():
    names = [f"i:{i}" for i in range(8)]
    here = [question_order(names, seed=1, step=2), draw_permutation("s:a", 6, seed=0, step=0)]
    code = (
        "import json; from riskpo_kernels.reference.pairing import *;"
        "print(json.dumps([question_order([f'i:{i}' for i in range(8)], seed=1, step=2),"
        "draw_permutation('s:a', 6, seed=0, step=0)]))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(there.stdout) == here
    assert question_order(names[::-1], seed=1, step=2) == here[0]
    assert here == PINNED


def test_pairing_is_uniform():
    counts = torch.zeros(3, 3)
    for step in range(900):
        for paper, draw in enumerate(draw_permutation("i:7", 3, seed=0, step=step)):
            counts[paper, draw] += 1
    assert (counts - 300).abs().max() < 60  # four standard deviations


def test_global_generators_are_left_alone():
    torch.manual_seed(5)
    random.seed(5)
    state, python = torch.get_rng_state(), random.getstate()
    RiskPOAdvantage()(*batch(10, 5), step=0)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_reward_types(dtype):
    r, ids = batch(10, 5)
    want, _ = RiskPOAdvantage()(r, ids, step=0)
    got, _ = RiskPOAdvantage()(r.to(dtype), ids, step=0)
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_result_is_detached():
    r, ids = batch(5, 4)
    for preset in ("paper", "official-easy", "official-hard"):
        assert not RiskPOAdvantage(preset)(r.requires_grad_(), ids, step=0)[0].requires_grad


def test_default_device_of_the_process_does_not_matter():
    r, ids = batch(10, 5)
    want = [RiskPOAdvantage()(r, ids, step=0)[0], RiskPOAdvantage("official-easy")(r, ids, step=0)]
    with torch.device("meta"):
        got = [
            RiskPOAdvantage()(r, ids, step=0)[0],
            RiskPOAdvantage("official-easy")(r, ids, step=0),
        ]
    assert torch.equal(got[0], want[0]) and got[1][1] == want[1][1]


@pytest.mark.gpu
def test_result_returns_to_the_rewards_device():
    r, ids = batch(10, 5)
    want, _ = RiskPOAdvantage()(r, ids, step=0)
    got, _ = RiskPOAdvantage()(r.cuda(), ids.cuda(), step=0)
    assert got.is_cuda and torch.equal(got.cpu(), want)


# --- ties and floors


@pytest.mark.parametrize("quantiles", ["tracked", "mix"])
def test_std_of_ties_cannot_blow_up(quantiles):
    r, ids = batch(10, 5)
    for scale in ("batch-std", "none"):
        make = RiskPOAdvantage(quantiles=quantiles, scale=scale)
        make(r, ids, step=0)
        advantage, stats = make(torch.zeros_like(r), ids, step=1)
        assert 0 < advantage.abs().max() <= 10 and stats["tied_bundle_fraction"] == 1


def test_loo_baseline_is_exactly_zero_on_ties():
    r, ids = torch.full((20,), 0.1, dtype=torch.float64), torch.arange(5).repeat(4)
    for scale, eps in (("none", 0.0), ("bundle-std", 0.0), ("bundle-std", 1e-6)):
        make = RiskPOAdvantage(baseline="leave-one-out", scale=scale, eps=eps)
        assert (make(r, ids, step=0)[0] == 0).all()


# --- steps and resuming


def test_tracked_quantiles_are_one_step_old():
    first, second, third = (batch(10, 5, seed=i) for i in range(3))
    make = RiskPOAdvantage(bundle_size=2)
    start = make(*first, step=0)[1]
    tracker = reference.QuantileTracker()
    tracker.update(scores_of(first, 0))
    assert [start["q_alpha"], start["q_beta"]] == pytest.approx(tracker.values.tolist())
    after = make(*second, step=1)[1]
    assert (after["q_alpha"], after["q_beta"]) == (start["q_alpha"], start["q_beta"])
    tracker.update(scores_of(second, 1))
    last = make(*third, step=7)[1]
    assert [last["q_alpha"], last["q_beta"]] == pytest.approx(tracker.values.tolist())
    assert last["q_alpha"] != after["q_alpha"]


def scores_of(rows, step):
    make = RiskPOAdvantage(bundle_size=2, form="mean", baseline="none")
    return make(*rows, step=step)[0][rows[1] < 99].double()


def test_same_step_again_moves_nothing():
    make, once = RiskPOAdvantage(bundle_size=2), RiskPOAdvantage(bundle_size=2)
    for step in range(3):
        rows = batch(10, 5, seed=step)
        want = once(*rows, step=step)
        got = make(*rows, step=step)
        again = make(*rows, step=step)
        assert torch.equal(got[0], want[0]) and got[1] == want[1]
        assert torch.equal(again[0], got[0])
        assert (got[1]["tracker_moved"], again[1]["tracker_moved"]) == (1.0, 0.0)
        make(*batch(10, 5, seed=50 + step), step=step)  # other rewards at this step: also nothing
    with pytest.raises(ValueError, match="step=1"):
        make(*batch(10, 5), step=1)


def test_a_refused_call_moves_nothing():
    make, clean = RiskPOAdvantage(bundle_size=2), RiskPOAdvantage(bundle_size=2)
    rows = batch(10, 5, seed=1)
    for m in (make, clean):
        m(*batch(10, 5), step=0)
    bad = rows[0].clone()
    bad[3] = float("nan")
    with pytest.raises(ValueError, match="row 3"):
        make(bad, rows[1], step=1)
    assert torch.equal(make(*rows, step=1)[0], clean(*rows, step=1)[0])
    assert make.state_dict() == clean.state_dict()


@pytest.mark.parametrize("preset", ["paper", "official-easy"])
def test_resume_gives_identical_results(preset):
    straight = RiskPOAdvantage(preset, bundle_size=2, seed=4)
    want = []
    for step in range(6):
        want.append(straight(*batch(10, 5, seed=step), step=step))
        if step == 2:
            saved = json.loads(json.dumps(straight.state_dict()))
    resumed = RiskPOAdvantage(preset, bundle_size=2)
    resumed.load_state_dict(saved)
    again, _ = resumed(*batch(10, 5, seed=2), step=2)  # the step that was saved, tried once more
    assert torch.equal(again, want[2][0])
    for step in range(3, 6):
        advantage, stats = resumed(*batch(10, 5, seed=step), step=step)
        assert torch.equal(advantage, want[step][0]) and stats == want[step][1]
    assert resumed.state_dict() == straight.state_dict()


def test_fresh_state_resumes_as_fresh():
    make = RiskPOAdvantage()
    make.load_state_dict(RiskPOAdvantage().state_dict())
    rows = batch(10, 5)
    assert torch.equal(make(*rows, step=0)[0], RiskPOAdvantage()(*rows, step=0)[0])


# --- refusals


def ask(r=None, ids=None, *, preset="paper", step=0, draw=None, **overrides):
    r0, ids0 = batch(5, 2)
    r, ids = r0 if r is None else r, ids0 if ids is None else ids
    return RiskPOAdvantage(preset, **overrides)(r, ids, step=step, draw=draw)


BAD = {
    "preset": (dict(preset="official"), "preset='official'"),
    "misspelt": (dict(bundle_sise=5), "Did you mean 'bundle_size'"),
    "unknown": (dict(zzz=5), "unknown setting 'zzz'"),
    "credit": (dict(credit="fair"), "credit='fair'"),
    "pairing": (dict(pairing="random"), "pairing='random'"),
    "form": (dict(form="official", alpha=1e-4), "alpha=0.0001"),
    "levels": (dict(alpha=0.9), "alpha=0.9, beta=0.8"),
    "bundle size": (dict(bundle_size=2.0), "bundle_size=2.0"),
    "bundle size 0": (dict(bundle_size=0), "at least 1"),
    "seed": (dict(seed="a"), "seed='a'"),
    "tracker step": (dict(tracker_step=0.0), "tracker_step=0.0"),
    "std of ties": (dict(preset="official-hard", quantiles="tracked"), "batch-std"),
    "step type": (dict(step=1.0), "step=1.0"),
    "step sign": (dict(step=-1), "step=-1"),
    "nan": (dict(r=torch.tensor([0.0, float("nan")] * 5)), "5 rewards that are NaN"),
    "infinite": (dict(r=torch.tensor([0.0, torch.inf] * 5)), "first at row 1"),
    "table": (dict(r=torch.zeros(5, 2)), r"float32\[5, 2\]"),
    "list": (dict(r=[0.0] * 10), "list"),
    "nothing": (dict(r=torch.zeros(0), ids=[]), "no rewards"),
    "ids short": (dict(ids=[1, 2, 3]), "3 values of question_id"),
    "ids float": (dict(ids=torch.zeros(10)), "integer tensor"),
    "ids text": (dict(ids="0123456789"), "question_id = str"),
    "ids mixed": (dict(ids=[1, "1"] * 5), "ints and strings"),
    "ids None": (dict(ids=[None] * 10), "NoneType"),
    "ids bool": (dict(ids=[True] * 10), "bool"),
    "ragged": (dict(ids=["a"] * 2 + ["b"] * 3 + ["c"] * 5), "3 responses to question 'b', 2"),
    "draw twice": (dict(ids=[0, 1, 2, 3, 4] * 2, draw=[0] * 10), "question 0"),
    "draw short": (dict(draw=[0]), "1 values of draw"),
    "draw text": (dict(draw=["a"] * 10), "draw"),
    "leftover": (dict(bundle_size=3), "Send 2 fewer"),
    "too few": (dict(bundle_size=6, leftover="drop"), "smaller bundle_size"),
    "one response": (dict(ids=list(range(10)), baseline="leave-one-out"), "1 response"),
}


@pytest.mark.parametrize("case", BAD)
def test_rejects(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        ask(**arguments)


def test_state_of_other_levels_is_refused():
    state = RiskPOAdvantage(alpha=0.1).state_dict()
    with pytest.raises(ValueError, match="levels"):
        RiskPOAdvantage().load_state_dict(state)

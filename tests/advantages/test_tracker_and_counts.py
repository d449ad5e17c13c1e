"""bundle_scores, pass_at_k and QuantileTracker: known numbers, the reference, bounds, resume."""

import itertools

import pytest
import torch

from riskpo_kernels import reference, risk
from tests import golden_risk as gold
from tests.test_risk import assert_near, t


def test_bundle_scores_of_known_rewards():
    r, xi = t(gold.PAPER_REWARDS), torch.tensor(gold.PAPER_PERMUTATION)
    for permutation, want in ((None, gold.PAPER_SCORES), (xi, gold.PAPER_SCORES_PERMUTED)):
        head = None if permutation is None else permutation[:4]
        tail = None if permutation is None else permutation[4:]
        assert risk.bundle_scores(r[:4], 2, permutation=head).tolist() == want[:2]
        assert risk.bundle_scores(r[4:], 1, permutation=tail).tolist() == want[2:]


def test_bundle_scores_match_reference():
    rewards = torch.rand(12, 5, dtype=torch.float64)
    xi = torch.stack([torch.randperm(5) for _ in range(12)])
    for size, permutation in itertools.product((1, 3, 12), (None, xi, xi.int())):
        got = risk.bundle_scores(rewards, size, permutation=permutation)
        want = reference.bundle_scores(rewards, size, permutation=permutation)
        assert_near(got, want, rtol=1e-12, atol=1e-12)
        assert_near(got.sum(1), rewards.unflatten(0, (-1, size)).sum((1, 2)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("n, c, k", gold.PASS_AT_K)
def test_pass_at_k_of_known_counts(n, c, k):
    for module in (risk, reference):
        got = module.pass_at_k(n, c, k)
        assert isinstance(got, float)
        assert_near(got, gold.PASS_AT_K[n, c, k])


def test_pass_at_k_of_tensors():
    n, c = torch.tensor([[12], [40]]), torch.arange(0, 12)
    for k in (1, 5, 12):
        got, want = risk.pass_at_k(n, c, k), reference.pass_at_k(n, c, k)
        assert got.shape == (2, 12) and got.dtype == torch.float64
        assert_near(got, want, rtol=1e-12, atol=1e-12)
    for n, c, k in ((4000, 3, 2000), (20000, 12000, 20000), (4000, 0, 4000)):
        assert_near(risk.pass_at_k(n, c, k), reference.pass_at_k(n, c, k))


@pytest.mark.parametrize("module", [risk, reference], ids=["op", "reference"])
def test_tracker_on_known_batches(module):
    tracker = module.QuantileTracker(gold.TRACKER_LEVELS, step=0.1)
    tracker.update(t(gold.TRACKER_FIRST))
    assert_near(tracker.values, t(gold.TRACKER_START))
    tracker.update(t(gold.TRACKER_SECOND))
    assert_near(tracker.values, t(gold.TRACKER_AFTER))

    tracker = module.QuantileTracker()
    for batch, want in zip(
        [gold.TRACKER_FIRST, gold.TRACKER_SECOND, gold.TRACKER_SECOND],
        gold.TRACKER_20_80,
        strict=True,
    ):
        tracker.update(t(batch))
        assert_near(tracker.values, t(want))


def test_tracker_speed_and_chatter_at_atoms():
    scores = torch.arange(6.0).repeat_interleave(torch.tensor(gold.BINOMIAL_COUNTS))
    tracker = risk.QuantileTracker()
    tracker.update(torch.zeros(32))
    path = []
    for _ in range(3000):
        tracker.update(scores)
        path.append(tracker.values)
    path = torch.stack(path)
    arrived = [int(((path[:, i] - x).abs() <= 0.1).nonzero()[0]) + 1 for i, x in ((0, 2), (1, 3))]
    # The worked numbers come from sampled batches; these batches hold the exact distribution.
    for got, want in zip(arrived, gold.BINOMIAL_STEPS_TO_ATOM, strict=True):
        assert abs(got - want) <= 0.05 * want
    late = path[-2000:]
    for i, (atom, level) in enumerate(((2, 0.2), (3, 0.8))):
        assert atom - 0.1 * (1 - level) < late[:, i].min()
        assert late[:, i].max() <= atom + 0.1 * level
    seen = torch.stack([late[:, 0].min(), late[:, 0].max(), late[:, 1].min(), late[:, 1].max()])
    assert_near(seen, t(gold.BINOMIAL_RANGE), rtol=0, atol=0.01)


def test_tracker_stays_in_bounds_and_in_order():
    levels = (0.4, 0.5, 0.6)
    tracker, mirror = risk.QuantileTracker(levels, 0.3), reference.QuantileTracker(levels, 0.3)
    crossed = False
    for i in range(400):
        alike = torch.full((7,), float(i // 10 % 6))  # one atom holds everything: levels cross
        scores = torch.randint(0, 6, (7,)).double() if i % 3 == 0 else alike.double()
        tracker.update(scores)
        mirror.update(scores)
        v = tracker.values
        assert_near(v, mirror.values, rtol=1e-12, atol=1e-12)
        assert (v.diff() >= 0).all()
        assert v.min() >= -0.3 * 0.6 and v.max() <= 5 + 0.3 * 0.6
        crossed |= bool((torch.tensor(tracker.state_dict()["quantiles"]).diff() < 0).any())
    assert crossed, "the stream never made two levels cross: the order was not put to the test"


def test_tracker_resumes():
    first, second = risk.QuantileTracker(), risk.QuantileTracker()
    second.load_state_dict(first.state_dict())
    assert not second.initialised
    first.update(torch.rand(20))
    second.load_state_dict(first.state_dict())
    batch = torch.rand(20)
    first.update(batch)
    second.update(batch)
    assert torch.equal(first.values, second.values)
    with pytest.raises(ValueError, match="levels"):
        risk.QuantileTracker((0.1, 0.8)).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="step=0.1"):
        risk.QuantileTracker(step=0.2).load_state_dict(first.state_dict())


def test_tracker_hands_out_copies():
    tracker = risk.QuantileTracker()
    tracker.update(torch.rand(9))
    before = tracker.values
    tracker.values.zero_()
    assert torch.equal(tracker.values, before)

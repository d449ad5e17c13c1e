"""What moved and what did not, judged by noise; the tracker's lag beside the scores themselves."""

from __future__ import annotations

import math
import random
import re

import pytest
import torch

from riskpo.config import SamplerConfig, TrainConfig, resolve
from riskpo.report.explain_trends import with_shares
from riskpo.report.findings import Log, change
from riskpo_kernels import QuantileTracker, RiskPOAdvantage
from tests.report.test_explain import HEALTHY, constant, write

MOVED, TRACKER = "Which counters moved", "Does the quantile tracker keep up"


def said(findings, topic):
    return [f"{'!' if f.notable else ' '} {f.text}" for f in findings if f.topic == topic]


def noisy(name, level, steps=100, spread=0.02, seed=0):
    """Records whose number `name` is level(step / steps), with seeded noise."""
    rng = random.Random(seed)
    return [
        HEALTHY | {name: level(i / steps) + rng.gauss(0, spread), "step": i} for i in range(steps)
    ]


# Noise ---------------------------------------------------------------------------------------


def test_noise_by_hand():
    """Standard deviations of 1, three steps each: the error is sqrt(2/3), Student's point 4.303."""
    found = change([0.0, 1.0, 2.0], [10.0, 11.0, 12.0])
    assert (found.early, found.late, found.moved) == (1.0, 11.0, True)
    assert found.noise == pytest.approx(1.5 * 4.303 * math.sqrt(2 / 3))
    assert not change([0.0, 1.0, 2.0], [5.0, 6.0, 7.0]).moved
    assert change([1.0, 2.0], [1.0, 2.0, 3.0]) is None
    assert change([0.0] * 3, [0.1] * 3).moved and not change([0.1] * 3, [0.1] * 3).moved


@pytest.mark.parametrize("n", [3, 5, 10, 20])
def test_noise_alone_hardly_ever_moves_a_counter(n):
    """2000 pairs without a difference: at most 1 % called moved; with 3 spreads most of them."""
    rng = random.Random(n)
    draws = [[[rng.gauss(0, 1) for _ in range(n)] for _ in range(2)] for _ in range(2000)]
    assert sum(change(a, b).moved for a, b in draws) <= 20
    shifted = sum(change(a, [x + 3 for x in b]).moved for a, b in draws)
    assert shifted > (1900 if n >= 10 else 200)


# Counters --------------------------------------------------------------------------------------

ALL = [
    "all-equal groups", "all-equal bundles", "responses with advantage 0",
    "clipped responses (sequence-level ratios)", "token entropy, nats", "truncated responses",
    "verifier timeouts", "verifier exceptions",
]  # fmt: skip
SHARES = ["scores below q_alpha (level 20%)", "scores below q_beta (level 80%)"]


def test_nothing_moves_in_a_constant_run(tmp_path):
    method, still = said(write(tmp_path, constant()), MOVED)
    assert method.startswith("  The first 4 steps against the last 4. Noise is 1.5 times half")
    assert still == f"  Did not move: {', '.join(ALL + SHARES)}."


@pytest.mark.parametrize(
    "name, label",
    [
        ("all_wrong_fraction", "All-equal groups"),
        ("tied_bundle_fraction", "All-equal bundles"),
        ("zero_advantage_fraction", "Responses with advantage 0"),
        ("clip_fraction", "Clipped responses (sequence-level ratios)"),
        ("sampled_entropy", "Token entropy, nats"),
        ("truncated_fraction", "Truncated responses"),
        ("sampler_ess", "Effective sample size of the sampler's weights"),
    ],
)
def test_each_counter_moves_alone(name, label, tmp_path):
    """From 0.1 to 0.5 in 100 steps: the middles of the fifths are at 9.5 and 89.5 of these."""
    settings = {"sampler": SamplerConfig(correction="tis"), "updates_per_step": 2}
    trend = noisy(name, lambda t: 0.1 + 0.4 * t, spread=0.002)
    found = said(write(tmp_path, trend, **settings), MOVED)
    assert len(found) == 3, found
    assert found[1].startswith(f"{'!' if name == 'truncated_fraction' else ' '} {label}: ")
    assert found[1].endswith(" times the noise).")
    early, late = (float(x) for x in re.findall(r"([\d.]+)%? (?:early|late)", found[1]))
    unit = 1 if name == "sampled_entropy" else 100
    offset = 10 if name == "all_wrong_fraction" else 0  # of groups with only right responses
    assert early == pytest.approx(0.138 * unit + offset, abs=0.002 * unit)
    assert late == pytest.approx(0.458 * unit + offset, abs=0.002 * unit)
    flat = noisy(name, lambda t: 0.1, spread=0.02)
    found = said(write(tmp_path, flat, **settings), MOVED)
    assert len(found) == 2 and label[1:] in found[1], found


def test_verifier_troubles_move_as_shares_of_all_verdicts(tmp_path):
    """30 of 330 at the end; falling back again is no worry."""
    for name, label in (("timeout", "timeouts"), ("crash", "exceptions")):
        rising = [HEALTHY | {f"outcome_{name}": 30.0 * (i >= 10)} for i in range(20)]
        found = said(write(tmp_path, rising), MOVED)
        expected = f"Verifier {label}: 0.0% early, 9.1% late (each time the same)."
        assert found[1] == f"! {expected}"
        found = said(write(tmp_path, rising[::-1]), MOVED)
        assert found[1].startswith(f"  Verifier {label}: 9.1% early, 0.0% late")


def test_ratios_are_named_as_the_algorithm_has_them(tmp_path):
    found = said(write(tmp_path, constant(), algorithm="grpo"), MOVED)
    assert "clipped tokens (token-level ratios)" in found[1] and "q_alpha" not in found[1]


def test_a_reward_that_falls_within_noise_is_no_finding(tmp_path):
    fall = noisy("reward_mean", lambda t: 0.4 - 0.01 * t, spread=0.05)
    (first,) = said(write(tmp_path, fall), "What happened")
    assert first.startswith("  riskpo-paper") and first.endswith(", within the noise of the steps.")
    fall = noisy("reward_mean", lambda t: 0.4 - 0.2 * t, spread=0.05)
    (first,) = said(write(tmp_path, fall), "What happened")
    assert first.startswith("! riskpo-paper") and first.endswith(" late.")


# The tracker -----------------------------------------------------------------------------------


def tracked(scores, levels=(0.2, 0.8)):
    """Records of a real tracker that met `scores`, one list per step, as the trainer logs them."""
    tracker, records = QuantileTracker(levels), []
    for batch in scores:
        x = torch.tensor(batch, dtype=torch.float64)
        if not records:
            tracker.update(x)
            before = tracker.values
        else:
            before = tracker.values
            tracker.update(x)
        own = torch.quantile(x, torch.tensor([0.2, 0.8], dtype=torch.float64))
        names = ("q_alpha_tracked", "q_beta_tracked", "batch_q_alpha", "batch_q_beta")
        values = map(float, (*before, *own))
        records.append(HEALTHY | dict(zip(names, values, strict=True)))
    return records


def binomial(chance, steps, seed=0, papers=64, bundle=5):
    rng = random.Random(seed)
    return [
        [float(sum(rng.random() < chance(i) for _ in range(bundle))) for _ in range(papers)]
        for i in range(steps)
    ]


@pytest.mark.parametrize("levels", [(0.2, 0.8), (0.1, 0.95), (0.3, 1.0)])
def test_shares_are_those_of_the_scores(levels):
    """Inferred from the tracker's trace alone, beside a count of the scores themselves."""
    scores = binomial(lambda i: 0.3 + 0.004 * i, 60)
    records = tracked(scores, levels)
    config, _ = resolve(TrainConfig(data="embedded:mixed", alpha=levels[0], beta=levels[1]))
    found = with_shares(Log(records, [], config))
    assert len(found) == 58
    for record, batch in zip(found, scores[1:-1], strict=True):
        for name in ("q_alpha", "q_beta"):
            below = sum(s < record[f"{name}_tracked"] for s in batch) / len(batch)
            assert record[f"share_below_{name}"] == pytest.approx(below, abs=1e-9)


def test_the_trace_is_that_of_the_advantage():
    """`tracked` stands in for RiskPOAdvantage: the same trace from the same rewards."""
    rewards = torch.bernoulli(torch.full((9, 40), 0.4), generator=torch.Generator().manual_seed(0))
    advantage, trace = RiskPOAdvantage("paper", bundle_size=1), []
    for step, r in enumerate(rewards, 1):
        _, stats = advantage(r, [f"q{i // 4}" for i in range(40)], step=step)
        trace.append((stats["q_alpha_tracked"], stats["q_beta_tracked"]))
    mine = [(r["q_alpha_tracked"], r["q_beta_tracked"]) for r in tracked(rewards.tolist())]
    assert mine == trace and len(set(trace)) == 8


def test_a_tracker_that_keeps_up(tmp_path):
    steady = tracked(binomial(lambda i: 0.4, 100))
    low, high = said(write(tmp_path, steady), TRACKER)
    assert low.startswith("  q_alpha: tracked 1.0") and "its level is 20%." in low
    assert "the late batches' own" in low and "the late batches' own" in high
    assert high.startswith("  q_beta: tracked 2.9") or high.startswith("  q_beta: tracked 3.0")


def test_other_levels_and_sizes_are_judged_by_their_own(tmp_path):
    """No number of the batch is at these levels; the tracker's trace says enough."""
    steady = tracked(binomial(lambda i: 0.4, 100, bundle=10), (0.1, 0.9))
    settings = {"alpha": 0.1, "beta": 0.9, "bundle_size": 10}
    low, high = said(write(tmp_path, steady, **settings), TRACKER)
    assert low.startswith("  q_alpha: tracked 2.0") and low.endswith("its level is 10%.")
    assert high.startswith("  q_beta: tracked 6.0") and high.endswith("its level is 90%.")
    assert "own" not in low + high
    low, high = said(write(tmp_path, steady, bundle_size=10), TRACKER)
    assert "own" not in low + high
    # the row's preset has a level of its own, which the settings leave unsaid
    mine, _, high = said(write(tmp_path, steady, algorithm="riskpo-official-easy"), TRACKER)
    assert "only watches it" in mine and high.endswith("its level is 90%.")


def test_levels_that_differ_in_lag(tmp_path):
    """All scores fall to 0: the lower quantile follows four times as fast as the upper one."""
    fall = tracked(binomial(lambda i: 0.9 if i < 20 else 0.0, 100))
    low, high, both = said(write(tmp_path, fall), TRACKER)
    assert low.startswith("  q_alpha") and "lags" not in low
    assert high.startswith("! q_beta") and "100% of the late scores lay below it" in high
    assert high.endswith("its level is 80%: it lags, too high and falling.")
    assert both.startswith("! The two differ in lag: ") and "ask for 60%" in both
    rise = tracked(binomial(lambda i: 0.0 if i < 60 else 1.0, 100), (0.4, 0.6))
    *_, both = said(write(tmp_path, rise, alpha=0.4, beta=0.6), TRACKER)
    assert both.startswith("! Both lag: 0% of the late scores lay between them")
    rise[-5]["q_beta_tracked"] = rise[-5]["q_alpha_tracked"]  # of the upper one nothing is known
    (low,) = said(write(tmp_path, rise, alpha=0.4, beta=0.6), TRACKER)
    assert low.startswith("! q_alpha")


def test_levels_that_coincide(tmp_path):
    """Every score is 2 from the second step on: both quantiles end there."""
    same = tracked([[0.0, 1.0, 2.0, 3.0] * 16, *[[2.0] * 64] * 200])
    first, low = said(write(tmp_path, same), TRACKER)
    assert first.startswith("! The levels 0.2 and 0.8 coincide: the late quantiles are 0.0")
    assert low.startswith("  q_alpha") and "20% of the late scores lay below it" in low
    assert not any("coincide" in x for x in said(write(tmp_path, constant()), TRACKER))


def test_a_quantile_that_is_another_s_copy_tells_nothing():
    config, _ = resolve(TrainConfig(data="embedded:mixed"))
    records = constant(q_alpha_tracked=2.0, q_beta_tracked=2.0)
    for record in with_shares(Log(records, [], config)):
        assert record["share_below_q_alpha"] == 0.2 and "share_below_q_beta" not in record

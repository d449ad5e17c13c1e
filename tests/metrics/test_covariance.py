"""The covariance terms against numpy, one question at a time, and against their identity."""

import numpy as np
import pytest
import torch

from riskpo.metrics import covariance
from riskpo.metrics.covariance import covariance_terms


def batch(questions=20, responses=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    rewards = (torch.rand(questions, responses, generator=g) < 0.45).float()
    return torch.randn(questions, responses, generator=g) * 3 - 5 + rewards, rewards


@pytest.mark.parametrize("omega", [0.0, 0.5, 2.0])
def test_the_identity_holds(omega, monkeypatch):
    monkeypatch.setattr(covariance, "OMEGA", omega)
    terms = covariance_terms(*batch())
    left = terms["cov_mean"] - terms["cov_mvar"]
    assert left == pytest.approx(terms["cov_upper"] + omega * terms["cov_lower"], abs=1e-12)
    assert abs(terms["cov_upper"]) > 1e-3 and abs(terms["cov_lower"]) > 1e-3


def test_against_numpy_by_hand():
    logprob, rewards = batch()
    terms = covariance_terms(logprob, rewards)
    scores = rewards.double().numpy().reshape(4, 5, 8).sum(1)
    lo, hi = np.quantile(scores, [0.2, 0.8])
    mean, mvar, corr = [], [], []
    for i, row in enumerate(logprob.double().numpy()):
        score = scores[i // 5]
        averse = -1.5 * np.maximum(lo - score, 0) + np.clip(score, lo, hi) - hi
        mean.append(np.cov(row, score)[0, 1])
        mvar.append(np.cov(row, averse)[0, 1])
        corr.append(np.corrcoef(row, score)[0, 1])
    assert terms["cov_mean"] == pytest.approx(np.mean(mean), abs=1e-12)
    assert terms["cov_mvar"] == pytest.approx(np.mean(mvar), abs=1e-12)
    assert terms["corr_mean"] == pytest.approx(np.mean(corr), abs=1e-12)


def test_the_difficulty_of_a_question_does_not_leak_in():
    logprob, rewards = batch()
    shifted = logprob + torch.arange(20.0)[:, None] * 10
    expected = covariance_terms(logprob, rewards)
    assert covariance_terms(shifted, rewards) == pytest.approx(expected, abs=1e-5)


def test_what_ties_has_no_correlation_and_what_is_left_over_no_say():
    logprob, rewards = batch(7)
    rewards[5:] = 1 - rewards[5:]
    assert covariance_terms(logprob, rewards) == covariance_terms(logprob[:5], rewards[:5])
    tied = covariance_terms(logprob[:5], torch.ones(5, 8))
    assert set(tied.values()) == {0.0}
    assert covariance_terms(logprob[:4], rewards[:4]) == {}
    assert covariance_terms(logprob[:5, :1], rewards[:5, :1]) == {}

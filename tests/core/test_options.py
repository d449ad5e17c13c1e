"""Every option of every op, given what it cannot be: an error that names the option."""

import inspect

import pytest
import torch

from riskpo_kernels import (
    RiskPOAdvantage,
    clipped_surrogate,
    linear_divergence,
    linear_logprob,
    logits_logprob,
    mvar_advantage,
    riskpo_loss,
)

H, W, TARGET = torch.randn(6, 8), torch.randn(33, 8), torch.arange(6) % 5
OLD, BOUNDS = -torch.rand(6), torch.tensor([0, 2, 4, 6])
CALLS = {
    linear_logprob: (H, W, TARGET),
    logits_logprob: (H @ W.T, TARGET),
    linear_divergence: (H, W, H, 2 * W),
    clipped_surrogate: (OLD, OLD, torch.ones(3)),
    riskpo_loss: (H, W, TARGET, OLD, torch.ones(3)),
    mvar_advantage: (torch.rand(4), 0.2, 0.8),
    RiskPOAdvantage: (),
}
LAID_OUT = (clipped_surrogate, riskpo_loss)  # take the sequences' bounds
WRONG = ("x", 1.5, [1], torch.ones(2), object())


def options_of(op):
    """name -> default"""
    if op is RiskPOAdvantage:
        return vars(op().settings)
    parameters = inspect.signature(op).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_an_option_of_another_kind_is_refused_by_name(op):
    given = {"cu_seqlens": BOUNDS} if op in LAID_OUT else {}
    op(*CALLS[op], **given)
    for name, default in options_of(op).items():
        for value in WRONG:
            try:
                op(*CALLS[op], **{**given, name: value})
            except (ValueError, TypeError) as error:
                assert name in str(error), (name, value, error)
            else:  # a number, of an option that is one
                assert isinstance(value, float), (name, value)
                assert not isinstance(default, (bool, str)), (name, value)

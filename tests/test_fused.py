"""riskpo_loss and riskpo_loss_from_logits: the composition, against the references composed."""

import pytest
import torch

from riskpo_kernels import (
    clipped_surrogate,
    linear_logprob,
    reference,
    riskpo_loss,
    riskpo_loss_from_logits,
)
from tests.compare import FACTOR, assert_all_close_as_plain
from tests.conftest import has_triton
from tests.head_inputs import head, split_columns

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason=""))]
LENGTHS = [5, 0, 9, 1, 12, 7, 3, 3]


def batch(device, dtype=torch.float32, ratio="sequence", **logits):
    """A packed batch whose old log-probs lie near the new ones: both clips and neither occur."""
    n = sum(LENGTHS)
    h, w, _, target = head(n, 70, 8, dtype, device)
    cu = torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()
    new = reference.linear_logprob(h.double(), w.double(), target, **logits).logprob.float()
    g = torch.Generator().manual_seed(5)
    width = 0.3 if ratio == "token" else 1e-3
    old = new + (torch.randn(n, generator=g) * width).to(device)
    advantage = torch.randn(len(LENGTHS), generator=g).to(device)
    return h, w, target, old, advantage, cu


def run(op, first, h, w, target, old, advantage, **options):
    """Loss, stats and gradients by name; `first` turns (hidden, weight) into the op's inputs."""
    h, w = h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    out = op(*first(h, w), target, old, advantage, **options)
    out.loss.backward()
    results = {"loss": out.loss, "dhidden": h.grad, "dweight": w.grad}
    return split_columns(results, target), out.stats


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_matches_the_references_composed(backend, ratio, device):
    h, w, target, old, advantage, cu = batch(device, ratio=ratio, temperature=0.8, softcap=20.0)
    target[2] = -100
    mask = torch.ones_like(target)
    mask[[7, 8, 20]] = 0
    options = {
        "cu_seqlens": cu,
        "mask": mask,
        "ratio": ratio,
        "entropy_coef": 0.01,
        "kl_coef": 0.1,
        "dual_clip": 3.0,
        "aggregate": "sequence-mean" if ratio == "sequence" else "token-mean",
        "temperature": 0.8,
        "softcap": 20.0,
    }
    exact = [h.double(), w.double(), target, old.double(), advantage.double()]

    def both(x, y):
        return x, y

    ref = {"ref_logprob": old + 0.05}
    wide = {"ref_logprob": (old + 0.05).double()}
    truth, stats = run(reference.riskpo_loss, both, *exact, **options, **wide)
    plain, _ = run(reference.riskpo_loss, both, h, w, target, old, advantage, **options, **ref)
    args = (h, w, target, old, advantage)
    got, seen = run(riskpo_loss, both, *args, backend=backend, memory_mib=0.1, **options, **ref)
    assert 0.05 < stats["clip_fraction"] < 0.95, "the batch exercises one branch only"
    # one row of 40 decides by its large coefficient, and there plain is right to 4e-8 by luck
    factor = 8 if backend == "triton" and ratio == "token" else FACTOR
    assert_all_close_as_plain(got, truth, plain, factor=factor)
    assert seen.keys() == stats.keys()
    for name, value in stats.items():  # single numbers: luck decides which rounding is better
        assert seen[name].double().item() == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name

    def as_logits(x, y):
        return (x @ y.T,)

    got, _ = run(riskpo_loss_from_logits, as_logits, *args, backend=backend, **options, **ref)
    assert_all_close_as_plain(got, truth, plain, factor=factor)


def test_padded_equals_packed(device):
    h, w, target, old, advantage, cu = batch(device)
    longest = max(LENGTHS)
    rows = torch.full((len(LENGTHS), longest), -1, device=device)
    for s, length in enumerate(LENGTHS):
        rows[s, longest - length :] = torch.arange(length, device=device) + cu[s]  # left padding
    mask = rows >= 0
    padded = {"mask": mask}
    garbage = torch.full((1, 8), float("nan"), device=device)
    hh = torch.cat([h, garbage])[rows]
    values = []
    for args, options in (
        ((h, w, target, old, advantage), {"cu_seqlens": cu}),
        ((hh, w, target[rows.clamp(min=0)], old[rows.clamp(min=0)], advantage), padded),
    ):
        leaf = w.clone().requires_grad_()
        out = riskpo_loss(args[0], leaf, *args[2:], **options)
        out.loss.backward()
        values.append((out.loss, leaf.grad))
    assert torch.allclose(*(v[0] for v in values), rtol=1e-6)
    assert torch.allclose(*(v[1] for v in values), atol=1e-7)


def test_micro_batches_with_a_global_denominator(device):
    """Trap 28: k micro-batches of whole sequences equal one batch, for every aggregation."""
    for ratio in ("sequence", "token"):
        h, w, target, old, advantage, cu = batch(device, ratio=ratio)
        tokens, sequences = target.numel(), len(LENGTHS)
        for aggregate, denominator, constant in (
            ("sequence-mean", sequences, None),
            ("token-mean", tokens, None),
            ("sequence-sum", sequences, None),
            ("sequence-sum-norm", sequences * 16, 16),
        ):
            options = {"ratio": ratio, "aggregate": aggregate, "constant": constant}
            one = w.clone().requires_grad_()
            whole = riskpo_loss(h, one, target, old, advantage, cu_seqlens=cu, **options)
            whole.loss.backward()
            many, total = w.clone().requires_grad_(), 0.0
            for a, b in ((0, 3), (3, 5), (5, 8)):
                rows = slice(int(cu[a]), int(cu[b]))
                part = riskpo_loss(
                    h[rows],
                    many,
                    target[rows],
                    old[rows],
                    advantage[a:b],
                    cu_seqlens=(cu[a : b + 1] - cu[a]),
                    denominator=denominator,
                    **options,
                )
                part.loss.backward()
                total += part.loss
            assert torch.allclose(total, whole.loss, rtol=1e-5, atol=1e-7), (ratio, aggregate)
            assert torch.allclose(many.grad, one.grad, rtol=1e-4, atol=1e-7), (ratio, aggregate)


def test_entropy_is_computed_only_on_request(device):
    h, w, target, old, advantage, cu = batch(device)
    args = (h, w, target, old, advantage)
    silent = riskpo_loss(*args, cu_seqlens=cu).stats
    asked = riskpo_loss(*args, cu_seqlens=cu, return_entropy=True).stats
    want = linear_logprob(h, w, target, return_entropy=True).entropy.mean()
    assert torch.allclose(asked["entropy"].float(), want)
    assert "entropy" not in silent


def test_equals_the_two_ops_in_sequence(device):
    h, w, target, old, advantage, cu = batch(device)
    token = linear_logprob(h, w, target)
    two = clipped_surrogate(token.logprob, old, advantage, cu_seqlens=cu, clip_low=0.01)
    one = riskpo_loss(h, w, target, old, advantage, cu_seqlens=cu, clip_low=0.01)
    assert torch.equal(one.loss, two.loss)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_on_policy_without_old_logprobs(backend, device):
    """old_logprob=None: ratio exactly 1, and the gradient is the policy gradient."""
    h, w, target, _, advantage, cu = batch(device)
    leaf = w.clone().requires_grad_()
    out = riskpo_loss(h, leaf, target, None, advantage, cu_seqlens=cu, backend=backend)
    out.loss.backward()
    assert out.stats["ratio_max"] == 1 and out.stats["clip_fraction"] == 0
    other = w.clone().requires_grad_()
    logprob = reference.linear_logprob(h, other, target).logprob
    lengths = torch.tensor(LENGTHS, device=device).clamp(min=1)
    per_token = (advantage / lengths).repeat_interleave(torch.tensor(LENGTHS, device=device))
    (-(per_token * logprob).sum() / len(LENGTHS)).backward()
    assert torch.allclose(leaf.grad, other.grad, atol=1e-6)


def test_rejects(device):
    h, w, target, old, advantage, cu = batch(device)
    args = (h, w, target, old, advantage)
    with pytest.raises(TypeError, match="did you mean 'aggregate'"):
        riskpo_loss(*args, cu_seqlens=cu, agregate="token-mean")
    with pytest.raises(TypeError, match="unexpected option 'bias'"):
        riskpo_loss_from_logits(h @ w.T, *args[2:], cu_seqlens=cu, bias=None)
    with pytest.raises(ValueError, match="one per target"):
        riskpo_loss(h, w, target, old[:-1], advantage, cu_seqlens=cu)
    with pytest.raises(ValueError, match="one per target"):
        riskpo_loss(*args, cu_seqlens=cu, mask=torch.ones(3))
    with pytest.raises(ValueError, match="requires? grad|detach"):
        riskpo_loss(h, w, target, old, advantage.requires_grad_(), cu_seqlens=cu)
    with pytest.raises(ValueError, match="target"):
        riskpo_loss(h, w, target[:-1], old, advantage.detach(), cu_seqlens=cu)

"""No gradient is left out without a word: neither that of a constant nor a second derivative."""

import pytest
import torch

from riskpo_kernels import (
    clipped_surrogate,
    linear_logprob,
    logits_logprob,
    riskpo_loss,
    riskpo_loss_from_logits,
)
from tests.surrogate_inputs import ALL, TRITON, tokens

CONSTANTS = ("old_logprob", "advantage", "correction", "ref_logprob", "mask", "denominator")
OPTIONS = {"ratio": "token", "aggregate": "token-mean", "kl_coef": 0.1, "entropy_coef": 0.1}
ONCE = "expected at most one, for the op is differentiable once"


def problem():
    """The arguments of clipped_surrogate, and hidden states, head and targets of as many tokens."""
    x, cu, mask = tokens(lengths=(3, 0, 4))
    x = x | {"mask": mask.float(), "denominator": torch.tensor(5.0)}
    head = torch.randn(len(mask), 5), torch.randn(9, 5), torch.arange(len(mask))
    return x | {"cu_seqlens": cu} | OPTIONS, head


def losses(x, head):
    """Every function that takes the constants, by name."""
    h, w, target = head
    rest = {k: v for k, v in x.items() if k not in ("logprob", "old_logprob", "advantage")}
    fused = {k: v for k, v in rest.items() if k != "entropy"}
    policy = x["old_logprob"], x["advantage"]
    return {
        "clipped_surrogate": lambda **o: clipped_surrogate(x["logprob"], *policy, **rest, **o).loss,
        "riskpo_loss": lambda **o: riskpo_loss(h, w, target, *policy, **fused, **o).loss,
        "riskpo_loss_from_logits": lambda **o: (
            riskpo_loss_from_logits(h @ w.T, target, *policy, **fused, **o).loss
        ),
    }


@pytest.mark.parametrize("backend", [*ALL, "auto"])
@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_that_requires_grad_is_refused(name, backend):
    x, head = problem()
    live = x | {name: x[name].clone().requires_grad_() * 1}
    for op, loss in losses(live, head).items():
        with pytest.raises(ValueError, match=rf"got {name} that requires grad.*{name}\.detach\(\)"):
            loss(backend=backend)
        if backend == "auto":
            fine = losses(live | {name: live[name].detach()}, head)[op]()
            assert fine.isfinite(), op


def test_the_new_logprob_as_the_old_one_is_refused():
    """The usual mistake of on-policy code; the ratio would then be 1 with the slope of a ratio."""
    x, _ = problem()
    new = x["logprob"].requires_grad_()
    with pytest.raises(ValueError, match=r"Pass old_logprob\.detach\(\)"):
        clipped_surrogate(**x | {"old_logprob": new})
    clipped_surrogate(**x | {"old_logprob": new.detach()}).loss.backward()
    assert new.grad.abs().max() > 0


def test_a_compiled_call_refuses_it_too():
    x, _ = problem()
    live = x | {"old_logprob": x["old_logprob"].clone().requires_grad_()}
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="old_logprob that requires grad"):
        torch.compile(clipped_surrogate, backend="eager")(**live)


def results(backend):
    """(op, result, leaf): every op, every result that has a gradient."""
    x, (h, w, target) = problem()
    for kind, leaf in (("hidden", h), ("weight", w), ("bias", torch.randn(9))):
        leaf = leaf.clone().requires_grad_()
        args = {"hidden": h, "weight": w, "bias": None} | {kind: leaf}
        out = linear_logprob(target=target, return_entropy=True, backend=backend, **args)
        yield from (("linear_logprob", y, leaf) for y in out)
    for inplace in (False, True):
        for i in range(3):  # in place there is one backward only
            leaf = h.clone().requires_grad_()
            options = {"inplace_backward": inplace, "return_entropy": True, "backend": backend}
            yield "logits_logprob", logits_logprob(leaf @ w.T, target, **options)[i], leaf
    for kind in ("logprob", "entropy"):
        leaf = x[kind].clone().requires_grad_()
        loss = clipped_surrogate(**x | {kind: leaf}, backend=backend).loss
        yield "clipped_surrogate", loss, leaf


@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("live", [False, True], ids=["constant upstream", "live upstream"])
def test_a_second_derivative_is_refused(backend, live):
    """Also beside another term, which has a second derivative of its own."""
    for op, y, leaf in results(backend):
        value = y.sum() * leaf.sum() if live else y.sum()
        (g,) = torch.autograd.grad(value, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{op}: got a backward.*{ONCE}"):
            (g.square().sum() + leaf.square().sum()).backward()


def test_the_reference_has_the_second_derivative():
    """What the error tells to use."""
    for op, y, leaf in results("reference"):
        (g,) = torch.autograd.grad(y.sum(), leaf, create_graph=True, retain_graph=True)
        if op == "clipped_surrogate" and not g.requires_grad:
            continue  # linear in the entropy
        (gg,) = torch.autograd.grad(g.square().sum(), leaf, retain_graph=True)
        assert gg.isfinite().all() and gg.abs().max() > 0, op

"""torch.compile(fullgraph=True) around the ops: no graph break, the eager numbers and gradients,
other lengths without another graph (trap 25); and what PyTorch demands of an operator."""

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend

from riskpo_kernels import (
    clipped_surrogate,
    linear_logprob,
    logits_logprob,
    mvar_advantage,
    reference,
    riskpo_loss,
    riskpo_loss_from_logits,
    rvar,
    sequence_logprob,
)
from riskpo_kernels.core import operators
from riskpo_kernels.core.operators import register
from riskpo_kernels.lm_head.logits_operator import logits_operator
from riskpo_kernels.lm_head.lora import lora_operator
from riskpo_kernels.lm_head.operator import head_operator
from riskpo_kernels.lm_head.support import support_operator
from riskpo_kernels.policy_loss.operator import surrogate_operator
from tests.conftest import has_triton
from tests.head_inputs import head

N, V, D = 40, 300, 16


def inputs(n=N, device="cpu"):
    h, w, b, target = head(n, V, D, torch.float32, device)
    target[3] = -100
    cu = torch.tensor([0, 9, 9, n - 5, n], dtype=torch.int32, device=device)
    advantage = torch.tensor([1.0, -1.0, 0.5, -2.0], device=device)
    return h, w, b, target, cu, advantage


@pytest.fixture(autouse=True)
def no_leftover_graphs():
    torch._dynamo.reset()


def both(f, leaves, *args, compiled):
    """Loss and gradients of f, as is or compiled."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    loss = (compiled if compiled else f)(*leaves, *args)
    loss.backward()
    return [loss.detach(), *(x.grad for x in leaves)]


def same(f, cases, graphs, backend="aot_eager"):
    """f(leaves..., args...) compiled once for all cases; how many graphs that took."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for leaves, args in cases:
        want, got = both(f, leaves, *args, compiled=None), both(f, leaves, *args, compiled=compiled)
        for x, y in zip(got, want, strict=True):
            assert torch.allclose(x, y, rtol=1e-5, atol=1e-6), (x - y).abs().max()
    assert counter.frame_count <= graphs, f"{counter.frame_count} graphs"


def test_support_and_several_targets():
    def f(h, w, target, ids):
        several = linear_logprob(h, w, torch.stack([target, ids[:, 0]], -1), ignore_index=None)
        few = linear_logprob(h, w, target, support=ids, outside_support="-inf")
        return several.logprob.sum() + few.lse.sum()

    h, w, _, target, *_ = inputs()
    ids = torch.stack([target.clamp(min=0), target.clamp(min=0) - 1], -1)
    same(f, [((h, w), (target.clamp(min=0), ids))], graphs=1)


def test_riskpo_loss():
    def f(h, w, b, target, cu, advantage):
        options = dict(bias=b, cu_seqlens=cu, temperature=0.7, entropy_coef=0.01)
        return riskpo_loss(h, w, target, None, advantage, **options).loss

    cases = [(x[:3], x[3:]) for x in (inputs(n) for n in (40, 33, 50, 61))]
    same(f, cases, graphs=2)  # the first length, then any


def test_riskpo_loss_from_logits():
    def f(z, target, mask, advantage):
        options = dict(mask=mask, ratio="token", aggregate="token-mean", clip_high=0.28)
        return riskpo_loss_from_logits(z * 1.0, target, None, advantage, **options).loss

    z, target = torch.randn(4, 9, V), torch.randint(V, (4, 9))
    mask, advantage = torch.rand(4, 9) > 0.3, torch.randn(4)
    same(f, [((z,), (target, mask, advantage))], graphs=1)


def test_temperature_as_a_number_and_as_a_tensor():
    """A number is a constant of the graph; a tensor is an input, so annealing it costs no graph.

    At the second number the compiler tries a graph with a symbol for it, and gives that up.
    """

    def f(h, w, target, t):
        out = linear_logprob(h, w, target, temperature=t, return_entropy=True, tail_eps=1e-6)
        return out.logprob.sum() + 0.3 * out.entropy.sum()

    h, w, _, target, *_ = inputs()
    same(f, [((h, w), (target, t)) for t in (0.5, 0.9)], graphs=3)
    numbers = [torch.full((N,), t) for t in (0.5, 0.9, 1.1)]
    torch._dynamo.reset()
    same(f, [((h, w), (target, t)) for t in numbers], graphs=1)


def numbers(v):
    """Every number that is an option, of the value v."""
    both = dict(temperature=v + 0.1, softcap=20 * v, clip_low=0.1 * v, clip_high=0.15 * v)
    both |= dict(dual_clip=1 + v, kl_coef=0.1 * v, entropy_coef=0.05 * v)
    head = dict(scale=0.8 + 0.2 * v, tail_eps=1e-3 * v, memory_mib=300 * v, constant=10 * v)
    return both, head, {"denominator": 3 * v}


def losses(h, w, target, cu, advantage, old, ref, both, head, logits):
    common = dict(cu_seqlens=cu, ratio="token", ref_logprob=ref, **both)
    norm = "sequence-sum-norm"
    a = riskpo_loss(h, w, target, old, advantage, aggregate=norm, **common, **head)
    b = riskpo_loss_from_logits(h @ w.T, target, old, advantage, **common, **logits)
    return a.loss + b.loss


def numbers_case():
    h, w, _, target, cu, _ = inputs()
    near = reference.linear_logprob(h, w, target, temperature=1.1, softcap=20.0).logprob
    old = near + torch.randn(N)
    return (h, w), (target, cu, torch.randn(N), old, old + 0.2 * torch.randn(N))


def test_numbers_that_change_between_calls():
    """A float that a graph knows as a symbol, where else it is used, is right in an option too.

    Here alone the graphs go through Inductor, both losses and their gradients in each.
    """

    def f(h, w, target, cu, advantage, old, ref, v):
        return losses(h * v, w, target, cu, advantage, old, ref, *numbers(v))

    leaves, rest = numbers_case()
    with torch._inductor.config.patch(compile_threads=1):  # its pool of workers is slow to start
        cases = [(leaves, (*rest, v)) for v in (1.0, 0.9, 0.8)]
        same(f, cases, graphs=9, backend="inductor")


def test_levels_that_change_between_calls():
    """The risk measures look at their scores, which breaks the graph; their numbers stay right."""

    def f(scores, v):
        s = scores * v
        words = dict(form="official", alpha=0.2 * v, beta=0.8 * v, w_mix=1.5 * v, eps=0.01 * v)
        return rvar(s, 0.1 * v, 0.9 * v) + mvar_advantage(s, -0.5 * v, 0.5 * v, **words).sum(-1)

    compiled, scores = torch.compile(f, backend="aot_eager"), torch.randn(3, 8)
    for v in (1.0, 0.9, 0.8):
        assert torch.allclose(compiled(scores, v), f(scores, v), rtol=1e-6, atol=1e-6), v


def test_every_number_matters_there():
    """Else the test above could not fail."""
    (h, w), rest = numbers_case()
    want = losses(h, w, *rest, *numbers(1.0))
    for i, group in enumerate(numbers(0.8)):
        for name, value in group.items():
            if name not in ("tail_eps", "memory_mib"):
                changed = list(numbers(1.0))
                changed[i] = changed[i] | {name: value}
                assert (losses(h, w, *rest, *changed) - want).abs() > 1e-4, name


def test_options_that_change_the_graph():
    """In-place backward is left out of a graph; the sequence sums have no operator of their own."""

    def f(z, target, cu):
        out = logits_logprob(z * 1.0, target, softcap=5.0, ignore_index=None, inplace_backward=True)
        return sequence_logprob(out.logprob, cu_seqlens=cu, reduce="mean").sum()

    z, target, cu = torch.randn(N, V), torch.randint(V, (N,)), inputs()[4]
    same(f, [((z,), (target, cu))], graphs=1)


def test_surrogate_with_everything():
    def f(new, entropy, old, advantage, cu, correction, ref, denominator):
        options = dict(correction=correction, ref_logprob=ref, kl_coef=0.1, entropy_coef=0.01)
        loss, stats = clipped_surrogate(
            new, old, advantage, cu_seqlens=cu, entropy=entropy, denominator=denominator, **options
        )
        return loss + 0 * stats["kl"]

    new, entropy = -torch.rand(N), torch.rand(N)
    old, ref = new + 0.1 * torch.randn(N), new + 0.1 * torch.randn(N)
    cu, advantage = inputs()[4:]
    rest = (old, advantage, cu, torch.rand(4), ref, torch.tensor(7.0))
    same(f, [((new, entropy), rest)], graphs=1)


def test_wrong_values_are_still_refused():
    """What only values show is checked when the graph runs."""
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
    h, w, _, target, *_ = inputs()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        compiled(h, w, target + V)


def test_an_operator_of_another_schema_or_source_has_another_name(monkeypatch):
    """A graph cached for the old one finds no operator, instead of calling this one."""

    def kernel(*x):
        return x[0].clone()

    schemas = ("(Tensor x) -> Tensor", "(Tensor x, float s) -> Tensor")
    old, new = (register("probe", schema, kernel, fake=kernel) for schema in schemas)
    assert old.name() != new.name() and old.name().startswith("riskpo_kernels::probe_")
    assert torch.equal(new(torch.ones(2), 3.0), torch.ones(2))
    monkeypatch.setattr(operators, "SOURCES", operators.SOURCES + 1)
    assert register("probe", schemas[0], kernel, fake=kernel).name() != old.name()


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("entropy", [False, True])
def test_head_operator_is_sound(eps, entropy):
    h, w, b, target, *_ = inputs()
    leaves = [x.requires_grad_() for x in (h, w, b)]
    words = (1.0, None, 0.7, entropy, "torch", 300.0, eps, False, True, -100, "", 0.5, True)
    torch.library.opcheck(head_operator.operator, (*leaves, target, None, *words))
    low = [torch.randn(*shape, requires_grad=True) for shape in ((2, D), (V, 2))]
    tensors = (leaves[0], *low, leaves[2], w.detach(), target, None)
    torch.library.opcheck(lora_operator.operator, (*tensors, *words))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_support_operator_is_sound(backend):
    if backend == "triton" and not has_triton():
        pytest.skip("needs triton")
    h, w, b, target, *_ = inputs()
    leaves = [x.requires_grad_() for x in (h[:6].clone(), w, b)]
    ids = torch.arange(24).reshape(6, 4)
    words = (1.0, None, 0.7, True, backend, 300.0, 0.0, False, True, -100, "", 1.0, False)
    given = (*leaves, target[:6], None, ids, None, *words)
    torch.library.opcheck(support_operator.operator, given)


def test_logits_and_surrogate_operators_are_sound():
    z, target = torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))
    numbers = (5.0, 1.0, True, False, "torch", -100)
    torch.library.opcheck(logits_operator, (z, target, torch.rand(N) + 0.5, *numbers))
    new, entropy = (torch.randn(N, requires_grad=True) for _ in range(2))
    cu, advantage = inputs()[4:]
    tensors = (new, entropy, torch.randn(N), advantage, None, None, None, cu, None, None)
    numbers = ("clip", [0.2, 0.2, 3.0], "sequence", "k3", 0.0, 0.1, "sequence-mean")
    torch.library.opcheck(surrogate_operator, (*tensors, "", *numbers, *(None,) * 5))

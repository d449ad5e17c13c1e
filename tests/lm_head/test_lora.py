"""A frozen head with LoRA on it: the numbers of the merged head, which is never made."""

from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from riskpo_kernels import linear_logprob, reference, riskpo_loss
from riskpo_kernels.core import softmax
from riskpo_kernels.core.low_rank import LowRank
from riskpo_kernels.core.matmul import Options, Products, counting
from riskpo_kernels.lm_head import lora
from tests.compare import assert_all_close_as_plain
from tests.conftest import has_triton
from tests.head_inputs import head, upstream

N, V, D, R = 97, 613, 24, 5
CASES = {  # dtype of hidden and head, of A and B, and options
    "fp64": (torch.float64, torch.float64, {}),
    "fp32": (torch.float32, torch.float32, {}),
    "bf16": (torch.bfloat16, torch.bfloat16, {}),
    "fp16": (torch.float16, torch.float16, {}),
    "bf16, fp32 adapter": (torch.bfloat16, torch.float32, {}),
    "fp16, fp32 adapter": (torch.float16, torch.float32, {}),
    "softcap": (torch.float32, torch.float32, {"softcap": 5.0, "scale": 1.3, "temperature": 0.7}),
    "row temperatures": (
        torch.float32,
        torch.float32,
        {"temperature": torch.linspace(0.4, 1.5, N)},
    ),
    "sparse rows": (torch.float32, torch.float32, {"tail_eps": 1e-30}),
    "deterministic": (torch.bfloat16, torch.bfloat16, {"deterministic": True}),
    "small tiles": (torch.float32, torch.float32, {"memory_mib": 0.07}),
}


def adapter(dtype):
    """B far from 0: what it adds changes which words are likely."""
    g = torch.Generator().manual_seed(9)
    return torch.randn(R, D, generator=g).to(dtype), torch.randn(V, R, generator=g).to(dtype) / 3


def inputs(dtype, low):
    h, w, b, target = head(N, V, D, dtype, "cpu")
    target[[3, 20]] = -100
    h[3] = torch.nan
    return (h, b, *adapter(low)), w, target


def results(op, leaves, w, target, **options):
    h, b, down, up = (x.detach().clone().requires_grad_() for x in leaves)
    out = op(h, w, target, bias=b, lora=(down, up, 0.7), return_entropy=True, **options)
    total = 0.0
    for seed, x in enumerate(out):
        c = upstream(x.shape, "cpu", seed=seed)[0]
        c = c.index_fill(0, torch.tensor([7, 8]), 0.0)  # two rows that nothing is sent to
        total = total + (x.double() * c).sum()
    total.backward()
    named = {"logprob": out.logprob, "entropy": out.entropy, "lse": out.lse}
    return named | {"dhidden": h.grad, "dbias": b.grad, "dA": down.grad, "dB": up.grad}


def check(case):
    dtype, low, options = CASES[case]
    leaves, w, target = inputs(dtype, low)
    own = {k: v for k, v in options.items() if k in ("softcap", "scale", "temperature")}
    exact = [x.double() for x in leaves]
    got = results(linear_logprob, leaves, w, target, **options)
    assert_all_close_as_plain(
        got,
        results(reference.linear_logprob, exact, w.double(), target, **own),
        results(reference.linear_logprob, leaves, w, target, **own),
    )
    assert not got["dhidden"][[3, 7, 8, 20]].any() and (got["logprob"][[3, 20]] == 0).all()
    return got


ROAD = {"backend": "triton", "memory_mib": 0.07}
SHAPED = {"softcap": 5.0, "scale": 1.3, "temperature": 0.7}
TRITON = {  # several tiles and groups of blocks; in the interpreter
    "dense rows": (torch.float32, ROAD | SHAPED),
    "sparse rows": (torch.float32, ROAD | {"temperature": torch.linspace(0.4, 1.5, N)}),
    "a few blocks": (torch.float16, ROAD | {"tail_eps": 2.0**-12}),
    "deterministic": (torch.float32, ROAD | {"deterministic": True}),
}


@pytest.mark.skipif(not has_triton(), reason="needs triton")
@pytest.mark.parametrize("case", TRITON)
def test_the_kernels_read_the_adapter_beside_the_head(case, monkeypatch):
    """In two pieces of the head forward and five backward, ragged."""
    from riskpo_kernels.lm_head import sparse_triton, triton_forward

    launches, groups = Mock(wraps=triton_forward.statistics), Mock(wraps=sparse_triton._one_group)
    monkeypatch.setattr(triton_forward, "statistics", launches)
    monkeypatch.setattr(sparse_triton, "_one_group", groups)
    monkeypatch.setattr(softmax, "DENSE_SHARE", dict.fromkeys(("cpu", "cuda"), 2.0))
    dtype, options = TRITON[case]
    eps = {} if case == "dense rows" else {"tail_eps": 1e-30}
    monkeypatch.setitem(CASES, case, (dtype, dtype, eps | options))
    check(case)
    filled = -R % 4 if "deterministic" in options else 0
    assert [x.args[1].shape[1] for x in launches.call_args_list] == [D + R + filled] * 2
    pairs = [
        sum(most[blocks])
        for _, _, _, most, _, blocks, *_ in (x.args for x in groups.call_args_list)
    ]
    every = (N - 4) * 5  # rows with a coefficient, blocks of 128
    assert len(pairs) == (0 if case == "dense rows" else 5)
    assert 0 < sum(pairs) < every if case == "a few blocks" else sum(pairs) in (0, every)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_merged_head(case, monkeypatch):
    if case == "sparse rows":
        monkeypatch.setattr(softmax, "DENSE_SHARE", {"cpu": 2.0})
    check(case)


ROUNDED = [(case, "torch") for case in CASES if "16" in case]
ROUNDED += [(case, "triton") for case in CASES if "fp16" in case] * has_triton()


@pytest.mark.parametrize(("case", "backend"), ROUNDED)
def test_as_a_gpu_rounds_its_operands(case, backend, monkeypatch, recomputed):
    """16-bit operands, float32 sums: what rounding h A^T would lose has columns of its own."""
    if torch.cuda.is_available():
        pytest.skip("the products are real here")
    if case == "fp16":  # else most rows go the dense way
        monkeypatch.setattr(softmax, "DENSE_SHARE", {"cpu": 2.0})
    made = Products.__init__

    def init(self, device, hidden, weight):
        made(self, device, hidden, weight)
        self.mixed = hidden != torch.float32
        self.dtype = hidden

    def into(self, out, a, b):
        assert a.dtype == b.dtype == self.dtype
        return out.copy_(a.float() @ b.float())

    def add(self, out, a, b, *, apart=False):
        assert a.dtype == b.dtype == self.dtype
        out.add_((a.float() @ b.float())[: out.shape[0]])

    for name, f in (("__init__", init), ("into", into), ("add", add)):
        monkeypatch.setattr(Products, name, f)
    leaves, w, target = inputs(*CASES[case][:2])
    got = results(linear_logprob, leaves, w, target, backend=backend)
    exact = results(reference.linear_logprob, [x.double() for x in leaves], w.double(), target)
    # u B^T is right to about 2^-16 of itself, and its terms are up to 20 here
    assert (got["logprob"] - exact["logprob"]).abs().max() < 20 * 2.0**-15
    for name in ("dhidden", "dA", "dB"):
        error = (got[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < (2.0**-7 if leaves[0].dtype == torch.bfloat16 else 2.0**-10), name
    monkeypatch.setattr(LowRank, "_pairs", [(0, 0)])
    rough = results(linear_logprob, leaves, w, target, backend=backend)["logprob"]
    assert (rough - exact["logprob"]).abs().max() > 20 * 2.0**-15


def test_no_head_is_merged_and_no_gradient_of_it_is_computed():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if isinstance(out, torch.Tensor):
                self.numbers = max(self.numbers, out.numel())
            return out

    h, w, _, target = head(64, 9000, 32, torch.float32, "cpu")
    a, b = torch.randn(4, 32), torch.randn(9000, 4)
    o = Options(1.0, None, 1.0, False, "torch", 0.4, 0.0, False, True, factor=0.5)
    fixed = (h, a, b, None, w, target, None)
    with counting() as work, Largest() as largest:
        logprob, entropy, _, *rest = lora._forward(*fixed, o)
        up = torch.ones_like(logprob), None, None
        lora._backward([True, True, True, False], up, fixed, (logprob, entropy, *rest), o)
    assert b.numel() <= largest.numbers <= w.numel() / 4  # B's gradient, a tile of logits
    # forward, its recompute and dH; the rank's share of them, and dB
    assert work.multiply_adds <= (3 * (32 + 4) + 4) * 64 * 9000


def test_an_adapter_of_zeros_changes_nothing():
    h, w, b, target = head(N, V, D, torch.float32, "cpu")
    a, _ = adapter(torch.float32)
    got = linear_logprob(h, w, target, bias=b, lora=(a, torch.zeros(V, R), 2.0))
    torch.testing.assert_close(got.logprob, linear_logprob(h, w, target, bias=b).logprob)


def test_the_policy_loss_takes_it():
    (h, b, *low), w, target = inputs(torch.float32, torch.float32)
    merged = w + 0.7 * low[1] @ low[0]
    given = (torch.full((N,), -3.0), torch.tensor([1.0, -1.0]))
    cu = torch.tensor([0, 40, N])
    got = riskpo_loss(h, w, target, *given, cu_seqlens=cu, bias=b, lora=(*low, 0.7))
    want = riskpo_loss(h, merged, target, *given, cu_seqlens=cu, bias=b)
    torch.testing.assert_close(got.loss, want.loss)


REFUSED = {
    "two": (lambda a, b, w: ((a, b), w), "lora = tuple"),
    "shape of A": (lambda a, b, w: ((a[:, 1:], b, 1.0), w), "lora's A of shape"),
    "shape of B": (lambda a, b, w: ((a, b[:, 1:], 1.0), w), "lora's B of shape"),
    "factor": (lambda a, b, w: ((a, b, float("nan")), w), "factor = nan"),
    "dtype": (lambda a, b, w: ((a.double(), b, 1.0), w), "A torch.float64 with hidden"),
    "trained": (lambda a, b, w: ((a, b, 1.0), w.requires_grad_()), "weight that requires grad"),
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_adapter_is_refused(case, backend):
    (h, _, *low), w, target = inputs(torch.float32, torch.float32)
    spoil, words = REFUSED[case]
    given, weight = spoil(*low, w)
    with pytest.raises(ValueError, match=f"linear_logprob: got .*{words}"):
        linear_logprob(h, weight, target, lora=given, backend=backend)


def test_support_and_several_targets_beside_it_are_refused():
    (h, _, *low), w, target = inputs(torch.float32, torch.float32)
    for ids, options in ((target, {"support": target[:, None]}), (target[:, None], {})):
        with pytest.raises(ValueError, match="got lora with .*; expected one target a row"):
            linear_logprob(h, w, ids, lora=(*low, 1.0), **options)

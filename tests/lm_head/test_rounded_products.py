"""The numbers of a GPU's 16-bit products, without one: operands rounded, sums in float32.

On a CPU 16-bit inputs are multiplied in float32. Here they are not: the gradient of the logits is
rounded before its two products, in the dense and in the sparse backward of both backends.
"""

import pytest
import torch

from riskpo.doctor import tolerance
from riskpo_kernels import linear_logprob, reference
from riskpo_kernels.core import softmax
from riskpo_kernels.core.matmul import Products, executed
from tests import compare
from tests.conftest import has_triton
from tests.head_inputs import head, run, split_columns

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason=""))]
SIXTEEN = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def tensor_core(monkeypatch, recomputed):
    """As chunks.Products on a GPU; fails where an operand is not of the products' dtype."""
    if torch.cuda.is_available():
        pytest.skip("the products are real here: the other tests show them")
    made = Products.__init__

    def init(self, device, hidden, weight):
        made(self, device, hidden, weight)
        common = torch.promote_types(hidden, weight)
        self.mixed = common in SIXTEEN
        self.dtype = common if self.mixed else self.wide

    def product(self, a, b):
        executed(*a.shape, b.shape[1])
        assert a.dtype == b.dtype == self.dtype
        return torch.mm(a.float(), b.float())

    def into(self, out, a, b):
        return out.copy_(product(self, a, b))

    def add(self, out, a, b, *, apart=False):
        out.add_(product(self, a, b)[: out.shape[0]])

    monkeypatch.setattr(Products, "__init__", init)
    monkeypatch.setattr(Products, "into", into)
    monkeypatch.setattr(Products, "add", add)
    monkeypatch.setattr(tolerance, "tensor_core", lambda x: True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["dense", "sparse"])
def test_gradients_stay_inside_the_rule(backend, way, device, monkeypatch):
    """fp16 in the interpreter, which multiplies bf16 wrongly."""
    monkeypatch.setattr(softmax, "DENSE_SHARE", {"cpu": 2.0})
    dtype = torch.bfloat16 if backend == "torch" else torch.float16
    for n, vocab, width in ((60, 300, 12), (37, 613, 24), (1, 7, 1), (300, 129, 12)):
        h, w, b, target = head(n, vocab, width, dtype, device)
        tensors = {"hidden": h, "weight": w, "bias": b}
        exact = {k: x.double() for k, x in tensors.items()}
        options = {"tail_eps": 0.0 if way == "dense" else 1e-30, "backend": backend}
        compare.assert_all_close_as_plain(
            run(linear_logprob, tensors, target, **options),
            run(reference.linear_logprob, exact, target),
            run(reference.linear_logprob, tensors, target),
        )


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.15])
def test_a_trained_head_at_the_default_threshold(shared_data, temperature):
    """Real rows, RiskPO-like coefficients: in the norm twice plain's error is enough."""
    from safetensors.torch import load_file

    rows = load_file(shared_data / "lm_rows" / "rows.safetensors")
    h, w = rows["hidden"][::8], rows["weight"]
    target = torch.multinomial((h.float() @ w.float().T / temperature).softmax(-1), 1)[:, 0]
    c = -torch.rand(16).repeat_interleave(16)

    def results(op, dtype, **options):
        hh, ww = (x.detach().clone().to(dtype).requires_grad_() for x in (h, w))
        out = op(hh, ww, target, temperature=temperature, **options)
        (out.logprob * c.to(out.logprob.dtype)).sum().backward()
        values = {"logprob": out.logprob, "dhidden": hh.grad, "dweight": ww.grad}
        return split_columns(values, target)

    truth = results(reference.linear_logprob, torch.float64)
    plain = results(reference.linear_logprob, torch.bfloat16)
    got = results(linear_logprob, torch.bfloat16, backend="torch")
    compare.assert_all_close_as_plain(got, truth, plain)
    for name in ("dhidden", "dweight (targets)", "dweight (others)"):
        norm, largest = compare.errors(got[name], truth[name])
        usual = compare.errors(plain[name], truth[name])
        print(f"{temperature} {name}: {norm / usual[0]:.2f} {largest / usual[1]:.2f} of plain's")
        assert norm < 2 * usual[0]

"""Peak resident memory of linear_logprob on a long context, in a process of its own."""

import subprocess
import sys

import pytest
import torch

from riskpo_kernels.core.matmul import BACKWARD_TILE, Head, Options, Products
from riskpo_kernels.core.softmax import LogitMap
from riskpo_kernels.lm_head.backward import dense_plan

PROGRAM = """
import re, torch
from riskpo_kernels import linear_logprob

def resident(name):  # of this process alone: ru_maxrss would begin at the parent's size
    with open("/proc/self/status") as status:
        return int(re.search(name + r":\\s+(\\d+) kB", status.read())[1]) * 1024

torch.manual_seed(0)
N, D, V = 2**17, 64, 8192
h = torch.randn(N, D).requires_grad_()
w = torch.randn(V, D).requires_grad_()
t = torch.randint(V, (N,))
# touch the libraries' own buffers before the measurement, on a small problem of the same shape
small, head = torch.randn(4096, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
linear_logprob(small, head, t[:4096], memory_mib=8).logprob.sum().backward()
before = resident("VmRSS")
out = linear_logprob(h, w, t, return_entropy=True, memory_mib=64)
(out.logprob.mean() + out.entropy.mean()).backward()
gradients = (h.grad.numel() + w.grad.numel()) * 4
print(resident("VmHWM") - before - gradients)
assert torch.isfinite(h.grad).all() and torch.isfinite(w.grad).all()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_long_context_stays_flat():
    """Trap 40. 2^17 tokens, V = 8192, memory_mib=64: the full logits would be 4 GiB; peak memory
    grows by less than 128 MiB over inputs and gradients."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    increase = int(run.stdout) / 2**20
    print(f"peak memory over inputs and gradients: {increase:.0f} MiB")
    assert 0 < increase < 128, f"{increase:.0f} MiB"


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("outer", [0, 1])
@pytest.mark.parametrize("width", [1536, 4096])
def test_the_dense_tile_fits_what_is_live(outer, width, apart, monkeypatch):
    """bf16 on a GPU: the gradient of the logits; of the axis that is opened and closed its sums in
    float32; copies of hidden states, and of their gradients, that lie apart. All rows come at once
    where then less of the sums moves. A tile twice as wide and tall would not fit."""
    monkeypatch.setitem(BACKWARD_TILE, "cpu", BACKWARD_TILE["cuda"])
    hidden, weight = (
        torch.empty(n, width, dtype=torch.bfloat16, device="meta") for n in (16384, 151_936)
    )
    rows = torch.empty(16384, dtype=torch.int64, device="meta") if apart else None
    head = Head(hidden, weight, None, rows, torch.empty(16384), LogitMap(1.0, None, 1.0))
    o = Options(1.0, None, 1.0, False, "triton", 300.0, 0.0, False, False)
    products = Products(torch.device("cpu"), torch.bfloat16, torch.bfloat16)
    products.mixed, products.dtype = True, torch.bfloat16
    plan = dense_plan(head, o, products, outer == 0)
    assert (plan.rows == 16384) == (outer == 1), plan

    def live(rows, cols):
        of_rows = (4 + 4 * apart if outer == 0 else 2 * apart) * rows
        return 2 * rows * cols + width * (of_rows + 4 * outer * cols)

    assert live(plan.rows, plan.cols) <= 300 * 2**20
    assert live(2 * plan.rows, 2 * plan.cols) > 300 * 2**20
    if plan.rows == 16384:
        assert live(plan.rows, plan.cols + 256) > 300 * 2**20


def test_a_product_of_halves_is_added_where_the_sums_lie(monkeypatch):
    """No float32 product beside them, save where it has to be rounded or cut first. CUDA has the
    products of 16 bits with float32 results; here they only say that they were asked for."""
    asked = []

    def of(name, real):
        def product(*given, out_dtype, **more):
            asked.append((name, out_dtype))
            return real(*(x.float() for x in given), **more)

        return product

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, of(name, getattr(torch, name)))
    products = Products(torch.device("cpu"), torch.float16, torch.float16)
    products.mixed, products.dtype = True, torch.float16
    a, b = torch.randn(5, 3).half(), torch.randn(3, 4).half()
    for rows, apart, name in ((5, False, "addmm"), (5, True, "mm"), (4, False, "mm")):
        sums = torch.ones(rows, 4)
        products.add(sums, a, b, apart=apart)
        assert asked.pop() == (name, torch.float32) and not asked
        assert torch.allclose(sums, 1 + (a.float() @ b.float())[:rows])

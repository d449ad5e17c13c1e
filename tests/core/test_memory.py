"""Peak resident memory of linear_logprob on a long context, in a process of its own."""

import subprocess
import sys

import pytest
import torch

from riskpo_kernels.core.matmul import Products

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

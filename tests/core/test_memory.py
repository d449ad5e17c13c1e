"""Peak resident memory of linear_logprob on a long context, in a process of its own."""

import subprocess
import sys

import pytest

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

"""What a call of the forward launches, and how long the host takes; the kernels are mocked."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from riskpo_kernels.core.matmul import Options
from tests.conftest import has_triton

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="needs triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="shown in the interpreter"),
]
FREE = (
    "empty empty_strided new_empty view slice select unbind as_strided detach alias expand "
    "promote_types fill_"  # fill_: the tests' NaN in fresh memory
)


class Launches(TorchDispatchMode):
    """Operators that would launch a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name not in FREE.split() and name != "_local_scalar_dense":
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def mocked(monkeypatch, launched):
    """The forward's kernels only note that they were launched; every 9th row is ignored."""
    from riskpo_kernels.kernels import finish_rows, head_forward, live_rows

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            def launch(**given):
                launched.append(self.name)
                if self.name == "live_kernel":
                    n = given["N"]
                    given["p_numbers"].numpy()[:] = (0, n - n // 9, 0, 5, 0)
                    given["p_order"].numpy()[:] = range(n)

            return launch

    for module, name in (
        (head_forward, "statistics_kernel"),
        (finish_rows, "finish_kernel"),
        (live_rows, "live_kernel"),
    ):
        monkeypatch.setattr(module, name, Kernel(name))


@pytest.mark.parametrize("n", [1, 64, 1024, 4096])
def test_few_launches_whatever_the_sizes(n, monkeypatch):
    from riskpo_kernels.lm_head import operator

    launched = []
    mocked(monkeypatch, launched)
    h, w = (torch.empty_strided((x, 1536), (1536, 1)) for x in (n, 151_936))
    target = torch.zeros(n, dtype=torch.int64)
    o = Options(1.0, 30.0, 0.7, True, "triton", 300.0, 2.0**-14, False, True)
    with Launches() as launches:  # the kernel itself: operators inside an operator are not seen
        operator.forward(h, w, None, target, None, replace(o, ignore_index=-100))
    found = launched + launches.names
    assert launched[0] == "live_kernel" and "finish_kernel" in launched
    assert len(found) <= 6, found


HOST = """
import time
import torch
from riskpo_kernels import linear_logprob
from tests.kernels.test_forward_launches import mocked

class Patch:
    setattr = staticmethod(setattr)

mocked(Patch, [])
h = torch.zeros(4096, 1536, requires_grad=True)  # 16 bits would be widened on a CPU
w = torch.empty(151_936, 1536)
target = torch.zeros(4096, dtype=torch.int64)

def unit():
    x = 0
    for i in range(10_000):
        x += i

def call():
    linear_logprob(h, w, target, return_entropy=True, ignore_index=None, backend="triton")

def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start

found = [(seconds(unit), seconds(call)) for _ in range(2000)]  # some of them undisturbed
print(min(u for u, _ in found), min(c for _, c in found))
"""


def test_host_time_of_a_call():
    """In a Python loop's 10,000 additions, so that it holds on any machine: 1.0 measured, 0.36 ms.
    (15 % of the 2.76 ms that are predicted for a GPU at N = 4096, D = 1536, V = 151,936 would be
    0.41.) Launches are mocked."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HOST], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    unit, call = map(float, done.stdout.split())
    assert call < 1.6 * unit, (unit, call)

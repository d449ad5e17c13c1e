"""How the head's kernels are launched: seen without a GPU, on recorded launches and keys."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from riskpo_kernels import linear_logprob
from riskpo_kernels.core import softmax
from riskpo_kernels.core.gradient import RowGradient
from riskpo_kernels.core.softmax import LogitMap
from tests.compare import errors
from tests.conftest import has_triton
from tests.head_inputs import head
from tests.lm_head.test_sparse_blocks import peaked

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason=""))]
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")


class Waits(TorchDispatchMode):
    """Counts the operators at which the host would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in WAITS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dense", "sparse", "deterministic"])
def test_backward_asks_the_device_once(backend, kind, device, monkeypatch):
    """Trap 43: the rows with a coefficient, of each way, and the pairs of each block, in one
    transfer, in whatever pieces; no other operator waits."""
    h, w, target = (x.to(device) for x in peaked(60, 1500, 16))
    h[::4] = 0.01  # flat rows, which go the dense way
    options = {"tail_eps": 0.0 if kind == "dense" else 2.0**-10}
    options |= {"deterministic": kind == "deterministic", "memory_mib": 1.0}
    hh, ww = h.requires_grad_(), w.requires_grad_()
    out = linear_logprob(hh, ww, target, backend=backend, ignore_index=None, **options)
    c = torch.linspace(-1, 1, 60, device=device) * (torch.arange(60, device=device) % 3 > 0)
    transfers, real = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: transfers.append(1) or real(x))
    sent, tensor = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *x, **more: sent.append(1) or tensor(*x, **more))
    with Waits() as waits:
        out.logprob.backward(c)
    # the pairs of each block go back, once for each group of blocks: all other lists are made there
    assert backend == "torch" or len(sent) <= 2
    assert len(transfers) == 1 and not waits.names, (transfers, waits.names)
    assert (hh.grad[1] != 0).any() and (hh.grad[::3] == 0).all()


KEYS = """
from dataclasses import replace
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from riskpo_kernels.core import softmax
from riskpo_kernels.lm_head import backward as head_backward
from riskpo_kernels.core import matmul
from riskpo_kernels.lm_head.triton_forward import triton_forward
from riskpo_kernels.kernels.softmax_rows import gradient, row_statistics
from riskpo_kernels.lm_head import sparse_triton as sparse_launch
from riskpo_kernels.core.matmul import Products
from riskpo_kernels.lm_head.ways import find_ways
from riskpo_kernels.core.gradient import RowGradient
from riskpo_kernels.core.softmax import LogitMap, RowState

class Driver:  # enough of a driver for the JIT to form its keys
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
keys = {}
def compiled(*, key, fn, **kwargs):
    keys.setdefault(fn.name.rpartition(".")[2], set()).add(key)
    return True  # says: somebody else has it, do not compile
knobs.runtime.jit_cache_hook = compiled
Products.into = lambda self, out, a, b: out.zero_()  # a key needs no numbers
Products.add = lambda self, out, a, b, apart=False: None

D, V = 64, 1000
sparse_launch.FEWEST_TILES, sparse_launch.EVEN = 2, 10**9  # heavy blocks are divided
w, b = torch.randn(V, D).half(), torch.randn(V).half()
for n in [1, 2, 15, 16, 17, *range(64, 1000, 64), 333]:
    h, t = torch.randn(n, D).half(), torch.full((n,), 0.7)[: n]
    head = matmul.Head(h, w, b, None, torch.randint(V, (n,)), LogitMap(1.0, None, t))
    o = matmul.Options(1.0, None, 1.0, True, "triton", 0.7, 1e-4, False, True)
    c = torch.ones(n)
    up = RowGradient(c, c, c, c, c)
    fp16 = torch.float16
    triton_forward(h, w, b, head.target, head.map, None, None, replace(o, memory_mib=0.05))
    raw = torch.randn(n, V).half()
    row_statistics(raw, head.target, head.map, [torch.empty(n)] * 5)
    gradient(raw, head.target, None, up, head.map, raw)
    active = softmax.ActiveBlocks.new(V, n, h.device)
    active.bits.fill_(255)
    active.dense[: n // 2] = True  # rows of both ways
    ways = find_ways(c != 0, active, V, 300)
    for asked in (o, replace(o, deterministic=True)):
        head_backward.backward_rows(head, up, active, ways, (True, True, True), asked)
print({name: len(found) for name, found in keys.items()})
"""


@needs_triton
def test_many_lengths_few_kernels():
    """Trap 24: 20 numbers of rows form one key for each kernel, whose compilation they share; a
    second one where a last tile of the vocabulary is narrower or tiles have another height (dW:
    both), never one per length."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", KEYS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = eval(done.stdout.strip().splitlines()[-1])
    names = {"_rows_kernel", "_gradient_kernel", "statistics_kernel", "finish_kernel"}
    names |= {"dz_kernel", "dh_kernel", "gather_kernel", "dw_kernel", "fold_kernel", "dense_kernel"}
    assert found.keys() == names, found
    assert found.pop("dw_kernel") == 4 and all(count <= 2 for count in found.values()), found


class Recorder:
    """Stands for a kernel; keeps the grids of its launches, and what device they would be on."""

    def __init__(self, guards):
        self.grids, self.guards = [], guards

    def __getitem__(self, grid):
        return lambda **given: self.grids.append(grid) or self.guards_hold()

    def guards_hold(self):
        assert self.guards, "launched on whatever device is current"


@pytest.fixture
def guards(monkeypatch):
    """The device guards that are held; kernels launched outside of them fail."""
    held = []

    @contextlib.contextmanager
    def device_of(x):
        held.append(x)
        yield
        held.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    return held


@needs_triton
def test_grids_of_many_rows(guards, monkeypatch):
    """Traps 19, 22, 23: 2^21 rows and more than 2^31 elements stay in the grid's first dimension,
    whose limit is 2^31 - 1 (the others': 65,535); launches are inside a guard of their device."""
    from riskpo_kernels.kernels import softmax_rows

    n, vocab = 2**21, 4096  # 2^33 elements
    whole, gradient = (Recorder(guards) for _ in range(2))
    monkeypatch.setattr(softmax_rows, "_rows_kernel", whole)
    monkeypatch.setattr(softmax_rows, "_gradient_kernel", gradient)
    row = torch.empty(n, device="meta")
    raw, target = torch.empty(n, vocab, device="meta"), row.long()
    map = LogitMap(1.0, None, 1.0)
    softmax_rows.row_statistics(raw, target, map, [row] * 5)
    softmax_rows.gradient(raw, target, None, RowGradient(*(row,) * 5), map, raw)
    for recorder in (whole, gradient):
        (grid,) = recorder.grids
        assert 1 <= grid[0] < 2**31 and all(x < 2**16 for x in grid[1:]), grid
    assert gradient.grids[0][0] > 65_535, "nothing was shown"


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="shown on CPU tensors, in the interpreter")
def test_sparse_launches_hold_the_device(guards, monkeypatch):
    from riskpo_kernels.lm_head import sparse_triton as sparse_launch

    recorders = {name: Recorder(guards) for name in ("dz_kernel", "dh_kernel", "dw_kernel")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(sparse_launch, name, recorder)
    monkeypatch.setattr(softmax, "DENSE_SHARE", {"cuda": 2.0, "cpu": 2.0})
    h, w, target = peaked(40, 1500, 16)
    out = linear_logprob(
        h.requires_grad_(), w.requires_grad_(), target, tail_eps=1e-3, backend="triton"
    )
    out.logprob.sum().backward()
    for recorder in recorders.values():
        assert recorder.grids and all(x < 2**16 for grid in recorder.grids for x in grid[1:])


@needs_triton
def test_dbias_is_summed_before_the_rounding(device, monkeypatch):
    """16-bit products round dz; a sum over many rows of one sign must not see that."""
    from riskpo_kernels.lm_head import sparse_triton as sparse_launch

    class Rounded(sparse_launch.products_of.__globals__["Products"]):
        """Operands as on a tensor core."""

        def __init__(self, *given):
            super().__init__(*given)
            self.dtype = torch.float16

    monkeypatch.setattr(softmax, "DENSE_SHARE", {"cuda": 2.0, "cpu": 2.0})
    monkeypatch.setattr(
        sparse_launch,
        "products_of",
        lambda x: Rounded(x.hidden.device, x.hidden.dtype, x.weight.dtype),
    )
    h, w, b, target = head(200, 200, 16, torch.float16, device)
    grads = []
    for kind, options in ((torch.float64, {"backend": "torch"}), (None, {"backend": "triton"})):
        tensors = [x if kind is None else x.to(kind) for x in (h, w)]
        bias = b.to(kind or torch.float32).requires_grad_()
        out = linear_logprob(*tensors, target, bias=bias, tail_eps=1e-30, **options)
        out.logprob.sum().backward()
        grads.append(bias.grad)
    assert errors(grads[1], grads[0])[0] < 2e-6  # of rounded dz: 1e-4

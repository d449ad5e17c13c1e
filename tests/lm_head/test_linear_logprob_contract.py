"""linear_logprob: what it promises besides its values. Trap numbers name known faults of peers."""

import pytest
import torch

from riskpo_kernels import linear_logprob, reference
from riskpo_kernels.core.matmul import Head, Products
from tests.conftest import has_triton
from tests.head_inputs import head, upstream

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason=""))]


def backward(out, c=True, g=True, e=False, **options):
    cs, gs = upstream(out.logprob.shape, out.logprob.device)
    total = 0.0
    if c:
        total = total + (out.logprob.double() * cs).sum()
    if g:
        total = total + (out.entropy.double() * gs).sum()
    if e:
        total = total + (out.lse.double() * (cs - gs)).sum()
    total.backward(**options)


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_upstream_gradient_alone(backend, device):
    """Trap 9: each of the three alone, all, none; the parts add up to the whole."""
    h, w, b, target = head(12, 60, 8, torch.float32, device)
    grads = {}
    alone = {"logprob": (1, 0, 0), "entropy": (0, 1, 0), "lse": (0, 0, 1)}
    for name, sent in {"all": (1, 1, 1), "none": (0, 0, 0), **alone}.items():
        hh, ww = leaves(h, w)
        out = linear_logprob(hh, ww, target, return_entropy=True, backend=backend)
        zero = (out.logprob * 0).sum()
        backward(out, *sent) if any(sent) else zero.backward()
        grads[name] = torch.cat([hh.grad, ww.grad])
    assert torch.allclose(grads["all"], sum(grads[name] for name in alone), atol=1e-5)
    assert all(grads[name].norm() > 0.1 for name in alone)
    assert (grads["none"] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_of_any_layout(backend, device):
    """Traps 11, 12, 13: expanded, strided, float64, scaled upstreams; retained graph twice."""
    h, w, b, target = head(12, 60, 8, torch.float32, device)
    hh, ww = leaves(h, w)
    out = linear_logprob(hh, ww, target, backend=backend)
    out.logprob.sum().backward(retain_graph=True)  # an expanded scalar
    once = hh.grad.clone(), ww.grad.clone()
    (out.logprob.sum() * 1024.0).backward(retain_graph=True)  # a loss scale
    assert torch.allclose(hh.grad - once[0], once[0] * 1024, rtol=1e-5)
    hh.grad = ww.grad = None
    out.logprob.double().sum().backward(retain_graph=True)
    assert torch.equal(hh.grad, once[0]) and torch.equal(ww.grad, once[1])
    hh.grad = None
    strided = torch.ones(24, device=device)[::2]
    out.logprob.backward(strided)
    assert torch.equal(hh.grad, once[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_hidden(backend, device):
    """Trap 14: leading dimensions are kept; transposed, sliced and broadcast hidden states."""
    h, w, b, target = head(12, 60, 8, torch.float32, device)
    flat = linear_logprob(h, w, target, backend=backend).logprob
    batch = linear_logprob(h.view(3, 4, 8), w, target.view(3, 4), backend=backend).logprob
    assert batch.shape == (3, 4) and torch.equal(batch.view(-1), flat)
    padded = torch.zeros(12, 20, device=device)
    padded[:, 5:13] = h
    assert torch.equal(linear_logprob(padded[:, 5:13], w, target, backend=backend).logprob, flat)
    transposed = h.T.contiguous().T
    assert torch.allclose(linear_logprob(transposed, w, target, backend=backend).logprob, flat)
    one = linear_logprob(h[:1].expand(12, 8), w, target, backend=backend).logprob
    same = linear_logprob(h[:1].repeat(12, 1), w, target, backend=backend).logprob
    assert torch.equal(one, same)
    single = linear_logprob(h[0], w, target[0], backend=backend).logprob
    assert single.shape == () and torch.allclose(single, flat[0])
    wide = torch.randn(60, 16, device=device)
    wide[:, ::2] = w
    assert torch.allclose(linear_logprob(h, wide[:, ::2], target, backend=backend).logprob, flat)
    options = {"bias": b, "temperature": torch.full((12,), 0.7, device=device), "backend": backend}
    want = linear_logprob(h, w, target, **options).logprob
    options["bias"] = torch.stack([b, b], 1)[:, 0]
    options["temperature"] = options["temperature"][:1].expand(12)
    ids = torch.stack([target, target], 1)[:, 0]
    assert torch.equal(linear_logprob(h, w, ids, **options).logprob, want)


def recorded_buffers(monkeypatch):
    """The sizes of all buffers made by torch.zeros, empty and zeros_like from now on."""
    made, like = [], torch.zeros_like

    def recorded(real):
        def make(*a, **k):
            made.append(a if isinstance(a[0], int) else tuple(a[0]))
            return real(*a, **k)

        return make

    for name in ("zeros", "empty"):
        monkeypatch.setattr(torch, name, recorded(getattr(torch, name)))
    monkeypatch.setattr(
        torch, "zeros_like", lambda x, **k: made.append(tuple(x.shape)) or like(x, **k)
    )
    return made


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_where_required(backend, device, monkeypatch):
    """Trap 15: a frozen weight or frozen hidden states cost no product and no buffer."""
    h, w, b, target = head(12, 60, 8, torch.float32, device)
    for frozen in ("weight", "hidden", "both"):
        hh, ww = h.clone(), w.clone()
        hh.requires_grad_(frozen == "weight")
        ww.requires_grad_(frozen == "hidden")
        bias = b.clone().requires_grad_(frozen == "both")
        made = recorded_buffers(monkeypatch)
        linear_logprob(hh, ww, target, bias=bias, backend=backend).logprob.sum().backward()
        monkeypatch.undo()
        assert (hh.grad is None) == (frozen != "weight")
        assert (ww.grad is None) == (frozen != "hidden")
        assert (bias.grad is None) == (frozen != "both")
        assert ((60, 8) in made) == (frozen == "hidden"), "a buffer for dW was made"
        assert ((12, 8) in made) == (frozen == "weight"), "a buffer for dH was made"
    assert not linear_logprob(h, w, target, backend=backend).logprob.requires_grad


def test_tied_weight(device):
    """Trap 16: a head shared with the embedding adds its gradient to the embedding's."""
    _, w, _, target = head(12, 60, 8, torch.float64, device)
    ids = torch.arange(12, device=device)
    grads = []
    for op in (linear_logprob, reference.linear_logprob):
        (weight,) = leaves(w)
        op(torch.tanh(weight[ids]), weight, target).logprob.sum().backward()
        grads.append(weight.grad)
    assert torch.allclose(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_ignored(backend, device):
    """Trap 20: no rows, all rows ignored; gradients exist and are zero."""
    h, w, b, target = head(6, 20, 4, torch.float32, device)
    for rows, ids in ((h[:0], target[:0]), (h * float("nan"), torch.full_like(target, -100))):
        hh, ww = leaves(rows, w)
        out = linear_logprob(hh, ww, ids, return_entropy=True, backend=backend)
        assert out.logprob.shape == ids.shape and (out.logprob == 0).all()
        assert (out.entropy == 0).all() and (out.lse == 0).all()
        (out.logprob.sum() + out.entropy.sum()).backward()
        assert (hh.grad == 0).all() and (ww.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_are_never_read(backend, device):
    """Rule 3: NaN in an ignored row stays there; other rows are bitwise unaffected."""
    h, w, b, target = head(12, 60, 8, torch.float32, device)
    keep = torch.tensor([0, 2, 3, 7, 8, 11], device=device)
    ids = torch.full_like(target, 3 - 100).index_copy(0, keep, target[keep])
    poisoned = torch.full_like(h, float("nan")).index_copy(0, keep, h[keep])
    results = []
    for rows, t in ((poisoned, ids), (h[keep], target[keep])):
        hh, ww = leaves(rows, w)
        out = linear_logprob(hh, ww, t, return_entropy=True, ignore_index=3 - 100, backend=backend)
        (out.logprob.sum() + out.entropy.sum()).backward()
        results.append((out, hh.grad, ww.grad))
    (a, dh_a, dw_a), (b, dh_b, dw_b) = results
    assert torch.equal(a.logprob[keep], b.logprob) and torch.equal(a.entropy[keep], b.entropy)
    assert torch.equal(dh_a[keep], dh_b) and torch.equal(dw_a, dw_b)
    assert torch.isfinite(dh_a).all() and dh_a.norm() == dh_b.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_coefficient_cost_no_backward(backend, device, monkeypatch):
    """Rule 3: exact zeros, and the row enters no product (its NaN does not spread)."""
    h, w, _, target = head(12, 60, 8, torch.float32, device)
    hh, ww = leaves(h, w)
    out = linear_logprob(hh, ww, target, return_entropy=True, backend=backend)
    c = torch.zeros(12, device=device)
    c[[1, 5]] = torch.tensor([2.0, -1.0], device=device)
    g = torch.zeros(12, device=device)
    g[5] = 0.5
    seen = []
    real = Head.take
    monkeypatch.setattr(
        Head, "take", lambda x, s, *a: seen.append(x.rows[s].tolist()) or real(x, s, *a)
    )
    ((out.logprob * c).sum() + (out.entropy * g).sum()).backward()
    assert seen and all(rows == [1, 5] for rows in seen)
    quiet = torch.ones(12, dtype=torch.bool, device=device)
    quiet[[1, 5]] = False
    assert (hh.grad[quiet] == 0).all() and (hh.grad[~quiet] != 0).any(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets(backend, device):
    """Trap 21: first and last id, int32 ids, a misaligned view of ids."""
    h, w, _, target = head(8, 33, 8, torch.float32, device)
    target[0], target[1] = 0, 32
    want = reference.linear_logprob(h.double(), w.double(), target).logprob
    for ids in (target, target.int(), torch.cat([target[:1], target])[1:]):
        got = linear_logprob(h, w, ids, backend=backend).logprob
        assert torch.allclose(got.double(), want, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_hold_exactly(backend, device):
    """Trap 4: logprob <= 0 and 0 <= entropy <= log V, from flat to one-hot rows."""
    h, w, _, target = head(200, 90, 8, torch.float32, device)
    for sharpness in (0.0, 1.0, 30.0, 1000.0):
        target = (h @ w.T).argmax(1)
        out = linear_logprob(h * sharpness, w, target, return_entropy=True, backend=backend)
        assert (out.logprob <= 0).all() and (out.entropy >= 0).all()
        assert (out.entropy <= torch.log(torch.tensor(90.0)) + 1e-6).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone_and_runs_repeat(backend, device):
    """Traps 35, 39: bitwise equal twice; inputs and version counters untouched."""
    h, w, b, target = head(40, 130, 8, torch.float32, device)
    hh, ww, bb = leaves(h, w, b)
    t = torch.full((40,), 0.7, device=device)
    tensors = (hh, ww, bb, target, t)
    before = [x.detach().clone() for x in tensors]
    versions = [x._version for x in tensors]
    runs = []
    for _ in range(2):
        out = linear_logprob(
            hh,
            ww,
            target,
            bias=bb,
            temperature=t,
            softcap=5.0,
            return_entropy=True,
            deterministic=True,
            memory_mib=0.05,
            backend=backend,
        )
        backward(out)
        runs.append([out.logprob, out.entropy, hh.grad, ww.grad, bb.grad])
        hh.grad = ww.grad = bb.grad = None
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert [x._version for x in tensors] == versions


def test_sixteen_bit_products_only_where_they_exist(monkeypatch):
    """Trap 18: below compute capability 8.0, and on a CPU, operands are widened."""
    for device, capability, mixed in (("cpu", None, False), ("cuda", (7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        products = Products(torch.device(device), torch.bfloat16, torch.bfloat16)
        assert products.mixed == mixed and products.dtype == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert Products(torch.device("cuda"), torch.float16, torch.float16).dtype == torch.float16
    wide = Products(torch.device("cuda"), torch.float16, torch.float32)
    assert not wide.mixed and wide.dtype == torch.float32, "a float32 head was rounded"


def test_packing_and_order_do_not_matter(device):
    """Rule 5: shuffled rows and micro-batches give the same numbers to float32 rounding."""
    h, w, _, target = head(60, 130, 16, torch.float32, device)
    order = torch.randperm(60, device=device)
    c, g = upstream((60,), device)

    def grads(parts):
        hh, ww = leaves(h, w)
        for rows in parts:
            out = linear_logprob(hh[rows], ww, target[rows], return_entropy=True)
            ((out.logprob * c[rows]).sum() + (out.entropy * g[rows]).sum()).backward()
        return hh.grad, ww.grad

    whole = grads([torch.arange(60, device=device)])
    for parts in ([order], order.split(7), torch.arange(60, device=device).split(1)):
        for x, y in zip(grads(parts), whole, strict=True):
            assert (x - y).norm() / y.norm() < 1e-6


def test_unused_entropy_costs_no_backward(device):
    """Trap 10: asking for the entropy without using it gives the gradients of not asking."""
    h, w, _, target = head(12, 60, 8, torch.float32, device)
    grads = []
    for asked in (True, False):
        hh, ww = leaves(h, w)
        linear_logprob(hh, ww, target, return_entropy=asked).logprob.sum().backward()
        grads.append((hh.grad, ww.grad))
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


def test_workspace_is_bounded_by_the_plan(device):
    h, w, _, target = head(3000, 4000, 8, torch.float32, device)
    from riskpo_kernels.core.matmul import plan_tiles

    plan = plan_tiles(
        "op",
        3000,
        4000,
        8,
        memory_mib=1,
        most_rows=4096,
        most_cols=4096,
        tile_bytes=8,
        edge_bytes=4,
    )
    assert 8 * plan.rows * plan.cols + 4 * 8 * (plan.rows + plan.cols) <= 2**20
    assert plan.rows * plan.cols > 2**15, "the plan wastes its budget"
    with pytest.raises(ValueError, match="Raise memory_mib"):
        linear_logprob(h, w, target, memory_mib=0.001)


@pytest.mark.gpu
def test_right_device_when_it_is_not_current():
    """Trap 19."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    h, w, _, target = head(64, 500, 32, torch.bfloat16, "cuda:1")
    with torch.cuda.device(0):
        out = linear_logprob(h, w, target, backend="triton")
    assert out.logprob.device.index == 1
    want = reference.linear_logprob(h, w, target).logprob
    assert torch.allclose(out.logprob, want, atol=1e-4)


@pytest.mark.gpu
def test_many_lengths_few_kernels(device):
    """Trap 24: 20 sequence lengths compile no new kernel after the first few."""
    from riskpo_kernels.kernels.finish_rows import finish_kernel
    from riskpo_kernels.kernels.head_forward import statistics_kernel

    h, w, _, target = head(4096, 2000, 64, torch.bfloat16, device)
    h.requires_grad_()
    for n in range(100, 2100, 100):
        linear_logprob(h[:n], w, target[:n], backend="triton").logprob.sum().backward()
    for kernel in (statistics_kernel, finish_kernel):
        compiled = sum(len(cache[0]) for cache in kernel.device_caches.values())
        assert compiled <= 8, compiled


@pytest.mark.gpu
def test_many_rows(device):
    """Trap 22: more than 65,535 and 2^17 rows."""
    h, w, _, target = head(2**17 + 5, 512, 16, torch.bfloat16, device)
    got = linear_logprob(h, w, target, backend="triton").logprob
    want = reference.linear_logprob(h.double(), w.double(), target).logprob
    assert (got - want).abs().max() < 1e-4

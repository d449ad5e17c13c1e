"""deterministic=True: a row's bits do not depend on the rows beside it."""

from itertools import product

import pytest
import torch

from riskpo_kernels import linear_logprob, reference
from tests.compare import assert_all_close_as_plain
from tests.conftest import has_triton, skip_if_numpy_feels_a_rows_place
from tests.head_inputs import head, run, upstream

V, D = 900, 48
ROWS = {"torch": 300, "triton": 140}
NEEDS_TRITON = pytest.mark.skipif(not has_triton(), reason="needs Triton")


def company(n):
    g = torch.Generator().manual_seed(3)
    yield "alone", torch.tensor([7])
    yield "five", torch.arange(5)
    yield "every third", torch.arange(0, n, 3)
    yield "shuffled", torch.randperm(n, generator=g)


def row_results(h, w, target, t, c, g, **options):
    h = h.clone().requires_grad_()
    w = w.clone().requires_grad_()
    out = linear_logprob(
        h, w, target, return_entropy=True, temperature=t, deterministic=True, **options
    )
    (out.logprob * c + out.entropy * g).sum().backward()
    return {"logprob": out.logprob.detach(), "entropy": out.entropy.detach(), "dH": h.grad}


@pytest.mark.parametrize(
    "backend, options, eps",
    [
        *product(["torch"], [{}, {"softcap": 5.0}, {"memory_mib": 0.3}], [0.0, 2.0**-7]),
        pytest.param("triton", {}, 2.0**-7, marks=NEEDS_TRITON),  # slow in the interpreter
    ],
    ids=str,
)
def test_a_row_does_not_feel_its_company(backend, options, eps, device):
    """Dense and sparse rows, tiles of every width, softcap, in float32 and 16 bits."""
    if backend == "triton":
        skip_if_numpy_feels_a_rows_place(device)
    n = ROWS[backend]
    sixteen = torch.float16 if device.type == "cpu" else torch.bfloat16  # fp16 is excepted there
    for dtype in (torch.float32, sixteen):
        h, w, _, target = head(n, V, D, dtype, device, bias=False, sharpness=6.0)
        h[::2] *= 0.2  # flat rows, which go the dense way
        t = torch.linspace(0.4, 1.6, n, device=device)
        c, g = (x.float() for x in upstream((n,), device))
        whole = row_results(h, w, target, t, c, g, tail_eps=eps, backend=backend, **options)
        for name, rows in company(n):
            if backend == "triton" and name != "every third":
                continue
            rows = rows.to(device)
            part = (x[rows] for x in (h, target, t, c, g))
            hh, *others = part
            got = row_results(hh, w, *others, tail_eps=eps, backend=backend, **options)
            for what, value in got.items():
                assert torch.equal(value, whole[what][rows]), (name, what, dtype)


@pytest.mark.parametrize("eps", [0.0, 2.0**-7])
def test_a_row_beside_an_adapter_does_not_either(eps, device):
    g = torch.Generator().manual_seed(4)
    lora = (torch.randn(5, D, generator=g), torch.randn(V, 5, generator=g) / 4, 0.5)
    n, lora = 300, (*(x.to(device) for x in lora[:2]), lora[2])
    h, w, _, target = head(n, V, D, torch.float32, device, bias=False, sharpness=6.0)
    c, up = (x.float() for x in upstream((n,), device))

    def results(rows):
        x = h[rows].requires_grad_()
        given = {"lora": lora, "tail_eps": eps, "return_entropy": True, "deterministic": True}
        out = linear_logprob(x, w, target[rows], backend="torch", **given)
        (out.logprob * c[rows] + out.entropy * up[rows]).sum().backward()
        return out.logprob, out.entropy, x.grad

    whole = results(torch.arange(n, device=device))
    for name, rows in company(n):
        for x, y in zip(whole, results(rows.to(device)), strict=True):
            assert torch.equal(x[rows.to(device)], y), name


@pytest.mark.parametrize("eps", [0.0, 1e-30])
def test_padded_rows_change_nothing(eps, device):
    """Numbers of rows around a whole tile: values and gradients are the reference's. (Of a single
    row the error is one rounding of its largest logit, by luck less in plain PyTorch.)"""
    for n in (60, 127, 128, 129):
        h, w, b, target = head(n, 300, 16, torch.float32, device)
        tensors = {"hidden": h, "weight": w, "bias": b}
        exact = {k: x.double() for k, x in tensors.items()}
        t = torch.linspace(0.5, 1.5, n, device=device)
        got = run(
            linear_logprob,
            tensors,
            target,
            temperature=t,
            tail_eps=eps,
            deterministic=True,
            backend="torch",
        )
        truth = run(reference.linear_logprob, exact, target, temperature=t)
        plain = run(reference.linear_logprob, tensors, target, temperature=t)
        assert_all_close_as_plain(got, truth, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_whole_and_padded_tiles_are_one(dtype, device):
    """Several tiles of columns, rows that fill a tile beside rows that do not, hidden states that
    lie by columns: dH is added up in the same way."""
    h, w, _, target = head(140, 5000, D, dtype, device, bias=False)
    by_columns = h.T.contiguous().T
    grads = []
    for x, rows in ((h, slice(0, 128)), (by_columns, slice(None)), (h, slice(5, 12))):
        x = x[rows].detach().requires_grad_()
        out = linear_logprob(x, w, target[rows], deterministic=True, tail_eps=0.0, backend="torch")
        out.logprob.sum().backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1][:128])
    assert torch.equal(grads[0][5:12], grads[2])

"""linear_logprob at the door: what it refuses, and which backend it takes."""

import subprocess
import sys

import pytest
import torch

from riskpo_kernels import backend_report, linear_logprob
from riskpo_kernels.core import checks
from tests.conftest import has_triton

H, W, T = torch.zeros(4, 8), torch.zeros(9, 8), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 9)}, "look like logits: use logits_logprob"),  # trap 41
        ({"hidden": torch.zeros(4, 7)}, "expected hidden of width 8"),
        ({"hidden": T}, "floating-point tensor"),
        ({"hidden": H.double()}, "equal dtypes"),
        ({"hidden": H.half(), "weight": W.bfloat16()}, "equal dtypes"),
        ({"weight": torch.zeros(8)}, r"expected \[V, D\]"),
        ({"weight": torch.zeros(0, 8)}, "GatheredParameters"),
        ({"target": T[:3]}, "hidden without its last dimension"),
        ({"target": T.float()}, "integer token ids"),
        ({"target": T + 9}, "outside the vocabulary"),
        ({"target": T - 1}, "Mask padding with ignore_index"),
        ({"bias": torch.zeros(8)}, "one per row of weight"),
        ({"bias": torch.zeros(9).half()}, "Cast the bias"),
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": float("nan")}, "above 0"),
        ({"temperature": torch.ones(4, requires_grad=True)}, r"temperature\.detach\(\)"),
        ({"temperature": torch.ones(3)}, "one per target"),
        ({"temperature": torch.tensor([1.0, 1.0, -1.0, 1.0])}, "1 temperatures not above 0"),
        ({"scale": 0.0}, "other than 0"),
        ({"softcap": 0.0}, "above 0"),
        ({"tail_eps": -1.0}, "at least 0"),
        ({"memory_mib": 0}, "above 0"),
        ({"backend": "tritron"}, "Check the spelling"),
        ({"target": T.to("meta")}, "Move them"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_rejects(change, message):
    arguments = {"hidden": H, "weight": W, "target": T} | change
    tensors = [arguments.pop(k) for k in ("hidden", "weight", "target")]
    with pytest.raises(ValueError, match=message):
        linear_logprob(*tensors, **arguments)


def test_sharded_weight_is_recognised():
    class Sharded(torch.Tensor):
        def full_tensor(self):
            raise AssertionError

    with pytest.raises(ValueError, match=r"full_tensor\(\)"):
        linear_logprob(H, torch.zeros(9, 8).as_subclass(Sharded), T)


def test_backends_are_explicit(monkeypatch, caplog):
    """An explicit backend that cannot run raises and says why; auto says what it chose."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="not CUDA and TRITON_INTERPRET=1 is not set"):
        linear_logprob(H, W, T, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if has_triton():
        with pytest.raises(ValueError, match="bfloat16 products"):
            linear_logprob(H.bfloat16(), W.bfloat16(), T, backend="triton")
        with pytest.raises(ValueError, match="float64"):
            linear_logprob(H.double(), W.double(), T, backend="triton")
    rows = backend_report()
    ops = {"linear_logprob", "logits_logprob", "linear_divergence", "clipped_surrogate"}
    assert {r.op for r in rows} == ops
    assert all(r.reason for r in rows) and "linear_logprob" in str(rows)
    checks._log_once.cache_clear()
    with caplog.at_level("INFO", logger="riskpo_kernels"):
        linear_logprob(H, W, T)
        linear_logprob(H, W, T)
    assert len(caplog.records) == 1 and "backend torch" in caplog.text


def test_works_without_triton(monkeypatch):
    """The package imports and runs where Triton is not installed (macOS, Windows)."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch, riskpo_kernels as r\n"
        "h, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)\n"
        "r.linear_logprob(h, w, torch.tensor([0, 1, 2])).logprob.sum().backward()\n"
        "assert all(c.backend == 'torch' for c in r.backend_report()), r.backend_report()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

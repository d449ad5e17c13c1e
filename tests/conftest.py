"""Decides once, before Triton is imported, whether kernels run on a GPU or in the interpreter."""

import os

import torch
import torch.utils._device

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by Triton at its first import
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub fails at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import importlib.util  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy  # noqa: E402
import pytest  # noqa: E402

# The first use of `with torch.device(...)` notes which functions make tensors: it must not be while
# poisoned_memory has replaced some, or the real ones would allocate under torch.device("meta").
torch.utils._device._device_constructors()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items):
    for item in items:
        nightly = "nightly" in item.keywords
        if nightly or "real_model" in getattr(item, "fixturenames", ()):
            item.add_marker("real")
        if nightly and not os.environ.get("RISKPO_REAL_MODEL"):
            item.add_marker(pytest.mark.skip(reason="takes a minute or more: make test-real"))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Uninitialised memory holds NaN under test, so an element nobody wrote cannot pass."""

    def poison(make):
        def poisoned(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.is_floating_point() and not x.is_meta:
                x.data.fill_(float("nan"))  # torch 2.11 asks for leaves that require grad
            return x

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture
def recomputed(monkeypatch):
    """The forward keeps no logits: small cases take the road of large ones."""
    monkeypatch.setattr("riskpo_kernels.core.softmax.SHARE", 10**12)


@pytest.fixture
def device():
    return torch.device(DEVICE)


@pytest.fixture
def isolation():
    """Asked for by tests.isolation.needs_sandbox."""
    from tests.isolation import CLOSED, skip_or_fail

    skip_or_fail(CLOSED)


@pytest.fixture
def shared_data():
    """Folder of real problems and labelled model answers; they are not part of the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder of real data is not beside this checkout")
    return SHARED_DATA


@pytest.fixture(scope="session")
def real_model():
    """Folder of a pretrained model: SmolLM2-135M-Instruct as Hugging Face files."""
    folder = os.environ.get("RISKPO_REAL_MODEL")
    if not folder:
        pytest.skip("RISKPO_REAL_MODEL names no folder of a pretrained model: make test-real")
    return Path(folder)


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def skip_if_numpy_feels_a_rows_place(device):
    """The interpreter multiplies with numpy, whose BLAS may round a row by where it stands."""
    generator = numpy.random.default_rng(0)
    a = generator.standard_normal((64, 32), dtype=numpy.float32)
    b = generator.standard_normal((32, 64), dtype=numpy.float32)
    order = generator.permutation(64)
    if device.type == "cpu" and not numpy.array_equal((a @ b)[order], a[order] @ b):
        pytest.skip("numpy's BLAS rounds a row by its place on this processor, and the interpreter")

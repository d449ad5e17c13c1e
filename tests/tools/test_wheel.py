"""The wheel is pure, imports without Triton or transformers, and costs little beside torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What `python -m build --wheel --no-isolation` calls.
BUILD = "from setuptools import build_meta; build_meta.build_wheel('.')"
IMPORT = """
import sys, time
missing = {"triton", "transformers"}
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        found = name.partition(".")[0] not in missing
        return self.finder.find_spec(name, path, target) if found else None
sys.meta_path[:] = [Without(f) if hasattr(f, "find_spec") else f for f in sys.meta_path]
began = time.process_time(); import torch
middle = time.process_time()
missing |= {"fcntl", "resource", "pwd", "grp", "termios"}  # Windows has none of them
for name in missing:
    sys.modules.pop(name, None)
import riskpo_kernels
ended = time.process_time()
assert riskpo_kernels.__file__.startswith(sys.argv[1]), riskpo_kernels.__file__
h, w = torch.randn(5, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
out = riskpo_kernels.linear_logprob(h, w, torch.arange(5), return_entropy=True)
(out.logprob + out.entropy).sum().backward()
want = (h @ w.T).log_softmax(-1)[torch.arange(5), torch.arange(5)]
torch.testing.assert_close(out.logprob, want)
assert w.grad.any() and not missing & set(sys.modules)
print((ended - began) / (middle - began))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")  # setuptools writes beside its sources
    for name in ("riskpo", "riskpo_kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = source.glob("*.whl")
    return found


def test_it_is_pure_and_asks_for_triton_on_linux_alone(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = (n for n in names if n.endswith("METADATA"))
        told = archive.read(about).decode()
    code = {n for n in names if ".dist-info/" not in n}
    assert code and {n.partition("/")[0] for n in code} == {"riskpo", "riskpo_kernels"}
    needed = [x for x in told.splitlines() if x.startswith("Requires-Dist") and "extra" not in x]
    assert needed == [
        "Requires-Dist: torch>=2.11",
        'Requires-Dist: triton>=3.6; platform_system == "Linux"',
    ]
    assert "Requires-Python: >=3.10" in told


def test_it_runs_without_triton_and_imports_in_less_than_half_of_torchs_time_more(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", IMPORT, str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 1.5

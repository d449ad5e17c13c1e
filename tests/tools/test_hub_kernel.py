"""The Hub's layout of riskpo_kernels, loaded under other names beside the installed package."""

from __future__ import annotations

import ast
import importlib.util
import sys

import pytest
import torch

import riskpo_kernels
from tools import hub_kernel


def load(package, name, monkeypatch):
    """As the Hub's loader does: the folder as a package of a unique name."""
    spec = importlib.util.spec_from_file_location(name, package / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_two_copies_and_the_installed_one_give_the_same_bits(tmp_path, monkeypatch):
    package = hub_kernel.write(tmp_path)
    assert "[torch-noarch]" in (tmp_path / "build.toml").read_text(encoding="utf-8")
    others = sys.stdlib_module_names | {"torch", "triton", "transformers", "deepspeed"}
    for path in package.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {x.name.partition(".")[0] for x in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.partition(".")[0])
        assert names <= others, (path.name, names - others)
    # another version has other sources, and operators of other names
    other = hub_kernel.write(tmp_path / "other")
    (other / "version.py").write_text("# the next one\n", encoding="utf-8")
    copies = [load(p, f"riskpo_kernels_{i}", monkeypatch) for i, p in enumerate((package, other))]
    assert len({m.linear_logprob.__module__ for m in (riskpo_kernels, *copies)}) == 3
    h, w = torch.randn(6, 8), torch.randn(300, 8)
    found = []
    for module in (riskpo_kernels, *copies):
        a, b = (x.clone().requires_grad_() for x in (h, w))
        out = module.linear_logprob(a, b, torch.arange(6), return_entropy=True)
        (out.logprob + out.entropy).sum().backward()
        found.append((out.logprob.detach(), a.grad, b.grad))
        with pytest.raises(ValueError, match="expected"):
            module.linear_logprob(h, w[:, :4], torch.arange(6))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
    for name in [n for n in sys.modules if n.startswith("riskpo_kernels_")]:
        monkeypatch.delitem(sys.modules, name)

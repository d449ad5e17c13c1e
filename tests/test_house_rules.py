"""The layers, the sizes, and one stem for each op: taste that the tests enforce."""

import ast
from pathlib import Path

import pytest

import riskpo_kernels
from riskpo_kernels import reference

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 350, 60, 90

# riskpo_kernels from the ground up. A module may import modules of lower floors only.
FLOORS = {
    "checks": 0,
    "reference": 0,
    "work": 0,
    "backends": 1,
    "chunks": 1,
    "inputs": 1,
    "risk_checks": 1,
    "surrogate_checks": 1,
    "softmax_rows": 1,
    "accumulate": 2,
    "block_selection": 2,
    "credit": 2,
    "grouping": 2,
    "kept_logits": 2,
    "presets": 2,
    "process_groups": 1,
    "registration": 1,
    "sharding": 1,
    "vocab_parallel": 2,
    "surrogate_torch": 2,
    "kernels": 3,
    "head_tiles": 4,
    "sparse_blocks": 5,
    "sparse_launch": 5,
    "row_ways": 5,
    "head_backward": 6,
    "head_op": 7,
    "linear_logprob": 8,
    "logits_logprob": 8,
    "surrogate_op": 7,
    "logits_op": 7,
    "surrogate": 8,
    "risk": 8,
    "difficulty": 8,
    "batch_stats": 9,
    "conditional": 9,
    "advantage": 10,
    "fused": 10,
    "__init__": 11,
}
# every public op: riskpo_kernels/<stem>.py, tests/test_<stem>.py, benchmarks/bench_<stem>.py
STEMS = ("linear_logprob", "logits_logprob", "surrogate", "fused", "risk", "advantage")
NO_REFERENCE = {"backend_report", "full_weight", "gathered_weight"}  # they compute nothing


def sources(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path):
    """Absolute names of everything a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def floor_of(name):
    """The floor of `riskpo_kernels.x...` as imported; names of the package itself are its roof."""
    parts = name.split(".")
    return FLOORS.get(parts[1], FLOORS["__init__"]) if len(parts) > 1 else FLOORS["__init__"]


def upward_arrows(path, stem):
    own = FLOORS[stem]
    for name in imports(path):
        if name.split(".")[0] != "riskpo_kernels":
            continue
        inside = name.split(".")[1:2] == [stem]  # a package's own parts
        if not inside and floor_of(name) >= own:
            yield f"{stem} must not import {name}"


def test_every_module_has_a_floor():
    stems = {p.relative_to(ROOT / "riskpo_kernels").parts[0] for p in sources("riskpo_kernels")}
    assert {s.removesuffix(".py") for s in stems} == set(FLOORS)


def test_arrows_point_down():
    found = []
    for path in sources("riskpo_kernels"):
        stem = path.relative_to(ROOT / "riskpo_kernels").parts[0].removesuffix(".py")
        found += upward_arrows(path, stem)
    assert not found, found


def test_a_planted_upward_arrow_is_found(tmp_path):
    planted = tmp_path / "risk.py"
    planted.write_text("from riskpo_kernels.fused import riskpo_loss\n")
    assert list(upward_arrows(planted, "risk"))


def test_reference_imports_torch_alone():
    for path in sources("riskpo_kernels/reference"):
        for name in imports(path):
            top = name.split(".")[0]
            own = name.startswith("riskpo_kernels.reference.")
            assert own or top in ("torch", *STANDARD), f"{path.name} imports {name}"


STANDARD = (
    "__future__",
    "collections",
    "dataclasses",
    "functools",
    "hashlib",
    "inspect",
    "itertools",
    "math",
    "struct",
    "types",
    "typing",
    "warnings",
)


def test_only_the_kernels_import_triton():
    for folder in ("riskpo_kernels", "riskpo"):
        for path in sources(folder):
            if "kernels" in path.relative_to(ROOT / folder).parts[:-1]:
                continue
            assert not any(name.split(".")[0] == "triton" for name in imports(path)), path


def test_the_trainer_uses_public_names_only():
    public = {f"riskpo_kernels.{name}" for name in riskpo_kernels.__all__} | {
        "riskpo_kernels.__version__"
    }
    for path in sources("riskpo"):
        used = {n for n in imports(path) if n.split(".")[0] == "riskpo_kernels"}
        assert used <= public | {"riskpo_kernels"}, (path.name, used - public)


def test_sizes():
    found = []
    for folder in ("riskpo_kernels", "riskpo", "benchmarks", "tests", "tools"):
        for path in sources(folder):
            text = path.read_text(encoding="utf-8")
            if text.count("\n") > MAX_FILE:
                found.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
                    # a signature or docstring is as long as the contract needs; a body is not
                    first = (
                        node.body[1] if ast.get_docstring(node) and node.body[1:] else node.body[0]
                    )
                    length = node.end_lineno - first.lineno + 1
                    if length > (MAX_KERNEL if kernel else MAX_FUNCTION):
                        found.append(f"{path.relative_to(ROOT)}: {node.name} is {length} lines")
    assert not found, found


@pytest.mark.parametrize("stem", STEMS)
def test_one_stem_four_homes(stem):
    for home in (
        f"riskpo_kernels/{stem}.py",
        f"tests/test_{stem}.py",
        f"benchmarks/bench_{stem}.py",
    ):
        assert (ROOT / home).is_file(), f"{home} is missing"


def test_every_public_name_has_a_reference_with_its_signature():
    import inspect

    for name in set(riskpo_kernels.__all__) - NO_REFERENCE:
        ours, theirs = getattr(riskpo_kernels, name), getattr(reference, name)
        if inspect.isfunction(ours):
            a, b = (
                [(p.name, p.kind) for p in inspect.signature(f).parameters.values()]
                for f in (ours, theirs)
            )
            assert a == b, f"{name}: {a} is not {b}"


def test_one_version():
    import re

    text = (ROOT / "riskpo_kernels" / "__init__.py").read_text(encoding="utf-8")
    assert re.search(r'^__version__ = "(\d+\.\d+\.\d+)"$', text, re.MULTILINE)
    assert riskpo_kernels.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

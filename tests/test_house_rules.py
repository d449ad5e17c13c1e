"""The layers, the sizes, and one stem for each op: taste that the tests enforce."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import riskpo_kernels
from riskpo_kernels import reference
from tools import structure

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE, MAX_FUNCTION, MAX_KERNEL = 350, 60, 90
MAX_FLOORS = {"riskpo_kernels": 7, "riskpo": 11}

# From the ground up. A folder, or a file beside the folders, imports earlier ones only.
LAYERS = (
    "riskpo_kernels.reference",
    "riskpo_kernels.core",
    "riskpo_kernels.kernels",
    "riskpo_kernels.lm_head",
    "riskpo_kernels.policy_loss",
    "riskpo_kernels.sharding",
    "riskpo_kernels.linear_logprob",
    "riskpo_kernels.causal_lm",
    "riskpo_kernels.linear_divergence",
    "riskpo_kernels.logits_logprob",
    "riskpo_kernels.surrogate",
    "riskpo_kernels.risk",
    "riskpo_kernels.advantages",
    "riskpo_kernels.advantage",
    "riskpo_kernels.fused",
    "riskpo_kernels",
    "riskpo",
    "riskpo.types",
    "riskpo.errors",
    "riskpo.files",
    "riskpo.config",
    "riskpo.eval_config",
    "riskpo.distributed",
    "riskpo.data",
    "riskpo.rewards",
    "riskpo.group_advantages",
    "riskpo.algorithms",
    "riskpo.model",
    "riskpo.demo",
    "riskpo.rollout",
    "riskpo.trainer",
    "riskpo.memory_plan",
    "riskpo.integrations",
    "riskpo.metrics",
    "riskpo.report",
    "riskpo.preflight",
    "riskpo.run",
    "riskpo.validation",
    "riskpo.train",
    "riskpo.eval",
    "riskpo.cli",
    "riskpo.__main__",
    "riskpo.compare",
    "riskpo.doctor",
    "riskpo.hosts",
)
# every public op: riskpo_kernels/<stem>.py, tests/test_<stem>.py, benchmarks/bench_<stem>.py
STEMS = (
    "linear_logprob",
    "linear_divergence",
    "logits_logprob",
    "surrogate",
    "fused",
    "risk",
    "advantage",
)
NO_REFERENCE = {
    "add_fused_lm_head",
    "backend_report",
    "full_weight",
    "gathered_weight",
}  # they compute nothing


def sources(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def upward_arrows(rooms):
    place = {name: i for i, name in enumerate(LAYERS)}
    return [
        f"{room} must not import {target}"
        for room, targets in rooms.items()
        for target in targets
        if place[target] >= place[room]
    ]


def test_every_room_has_a_layer():
    assert set(structure.room_graph(structure.module_graph())) == set(LAYERS)


def test_arrows_point_down():
    found = upward_arrows(structure.room_graph(structure.module_graph()))
    assert not found, found


def test_few_files_are_read_for_a_pass():
    forward, backward = structure.executed_files()
    glue = {"riskpo_kernels/core/operators.py"}  # every op's, between it and PyTorch
    own = set(forward) - glue, set(backward) - glue
    assert len(own[0]) <= 5 and len(own[1]) <= 5, own


def test_a_planted_upward_arrow_is_found():
    rooms = structure.room_graph(structure.module_graph())
    rooms["riskpo.rewards"] = rooms["riskpo.rewards"] | {"riskpo.trainer"}
    assert upward_arrows(rooms) == ["riskpo.rewards must not import riskpo.trainer"]


def test_no_file_is_in_a_circle():
    assert structure.circles(structure.module_graph()) == []


@pytest.mark.parametrize("package", MAX_FLOORS)
def test_few_floors(package):
    floors = structure.floors(structure.room_graph(structure.module_graph()), package)
    assert max(floors.values()) <= MAX_FLOORS[package], floors


def test_the_trainer_is_eleven_files_deep():
    floors = structure.floors(structure.module_graph(), "riskpo")
    assert max(floors.values()) <= MAX_FLOORS["riskpo"], sorted(floors, key=floors.get)[-3:]


def test_circles_and_floors_of_a_small_graph():
    assert structure.circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]
    assert structure.floors({"p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": set()}, "p")["p.a"] == 3


def test_reference_imports_torch_alone():
    for path in sources("riskpo_kernels/reference"):
        for name in structure.imported_names(path):
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
            names = structure.imported_names(path)
            assert not any(name.split(".")[0] == "triton" for name in names), path


def test_the_trainer_uses_public_names_only():
    rooms = (riskpo_kernels, riskpo_kernels.causal_lm)
    public = {f"{room.__name__}.{name}" for room in rooms for name in room.__all__} | {
        "riskpo_kernels.__version__"
    }
    for path in sources("riskpo"):
        names = structure.imported_names(path)
        used = {n for n in names if n.split(".")[0] == "riskpo_kernels"}
        assert used <= public | {"riskpo_kernels"}, (path.name, used - public)


def test_tests_stand_where_what_they_test_stands():
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and p.name[0] not in "._"}
    homes = {name.rpartition(".")[2] for name in LAYERS} | {"benchmarks", "tools"}
    assert folders - homes == set()


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
    for name in set(riskpo_kernels.__all__) - NO_REFERENCE:
        ours, theirs = getattr(riskpo_kernels, name), getattr(reference, name)
        if inspect.isfunction(ours):
            a, b = (
                [(p.name, p.kind) for p in inspect.signature(f).parameters.values()]
                for f in (ours, theirs)
            )
            assert a == b, f"{name}: {a} is not {b}"


def test_one_version():
    text = (ROOT / "riskpo_kernels" / "__init__.py").read_text(encoding="utf-8")
    assert re.search(r'^__version__ = "(\d+\.\d+\.\d+)"$', text, re.MULTILINE)
    assert riskpo_kernels.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_old_import_paths_work_and_say_so():
    old = {path.stem for path in sources("riskpo/hosts")} - {"__init__"}
    assert old == {path.parent.name for path in sources("riskpo/integrations")} - {"integrations"}
    code = (
        "import importlib, sys, types, warnings\n"
        f"for name in {old}:\n"
        "    new = types.ModuleType(f'riskpo.integrations.{name}')\n"  # trl takes ten seconds
        "    sys.modules[new.__name__] = new\n"
        "    with warnings.catch_warnings(record=True) as caught:\n"
        "        warnings.simplefilter('always')\n"
        "        assert importlib.import_module(f'riskpo.hosts.{name}') is new\n"
        "    said = [str(w.message) for w in caught if w.category is DeprecationWarning]\n"
        "    assert any(f'riskpo.hosts.{name} has moved' in text for text in said), said\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

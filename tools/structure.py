"""`python -m tools.structure`: the packages as drawn by their imports.

A room is a folder, or a file beside the folders. Its floor is one above the highest room that it
imports. Imports inside functions count too. The last lines list the files that one forward and
one backward of `linear_logprob` run through (torch backend, dense and sparse rows).
"""

from __future__ import annotations

import ast
import sys
import threading
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("riskpo_kernels", "riskpo")
Graph = Mapping[str, set[str]]


def module_files(package: str) -> dict[str, Path]:
    """Dotted name of every module of a package -> its file."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(path: Path) -> list[str]:
    """Everything a file imports, by absolute name; `from a import b` is a.b."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}: got a relative import; expected absolute names.")
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def module_graph(packages: tuple[str, ...] = PACKAGES) -> dict[str, set[str]]:
    """Module -> modules that it imports, over all packages."""
    files = {name: path for p in packages for name, path in module_files(p).items()}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        graph[module] = set()
        for name in imported_names(path):
            target = name if name in files else name.rpartition(".")[0]
            if target in files and target != module:
                graph[module].add(target)
    return graph


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def room_graph(graph: Graph) -> dict[str, set[str]]:
    """Room -> rooms that it imports."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for module, targets in graph.items():
        rooms[room(module)] |= {room(t) for t in targets} - {room(module)}
    return dict(rooms)


def circles(graph: Graph) -> list[list[str]]:
    """Groups of nodes that import each other, directly or not."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        stack = list(graph[start])
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack += graph.get(node, ())
        reach[start] = seen
    groups = {
        tuple(sorted({a} | {b for b in reach[a] if a in reach.get(b, ())}))
        for a in graph
        if a in reach[a]
    }
    return [list(g) for g in sorted(groups)]


def floors(graph: Graph, package: str) -> dict[str, int]:
    """Node -> 1 + the highest floor among the nodes of the same package that it imports.

    RecursionError where there is a circle: look at `circles` first.
    """
    found: dict[str, int] = {}

    def floor(node: str) -> int:
        if node not in found:
            own = (t for t in graph[node] if t.split(".")[0] == package)
            found[node] = 1 + max((floor(t) for t in own), default=0)
        return found[node]

    for node in graph:
        if node.split(".")[0] == package:
            floor(node)
    return found


def lines_of(package: str) -> dict[str, int]:
    """Room -> its lines."""
    total: dict[str, int] = defaultdict(int)
    for module, path in module_files(package).items():
        total[room(module)] += path.read_text(encoding="utf-8").count("\n")
    return dict(total)


def executed_files() -> tuple[list[str], list[str]]:
    """Files of riskpo_kernels that one forward runs through, and those only the backward does."""
    import torch

    from riskpo_kernels import linear_logprob

    seen: set[str] = set()
    before = str(ROOT / "riskpo_kernels")

    def trace(frame, event, argument):  # type: ignore[no-untyped-def]
        if frame.f_code.co_filename.startswith(before):
            seen.add(str(Path(frame.f_code.co_filename).relative_to(ROOT)))

    # Python 3.12 has it; before, a backward on a CPU runs in the thread that asks for it
    profile = getattr(threading, "setprofile_all_threads", sys.setprofile)
    torch.manual_seed(0)
    weight, target = torch.randn(512, 32, requires_grad=True), torch.randint(512, (256,))
    passes: tuple[set[str], set[str]] = (set(), set())
    for sharpness in (0.1, 30.0):  # rows that are dense, rows that are sparse
        hidden = (sharpness * torch.randn(256, 32)).requires_grad_()
        profile(trace)
        out = linear_logprob(
            hidden, weight, target, return_entropy=True, tail_eps=2**-14, backend="torch"
        )
        passes[0].update(seen)
        seen.clear()
        (out.logprob.sum() + out.entropy.sum()).backward()
        profile(None)
        passes[1].update(seen)
        seen.clear()
    forward, backward = passes
    return sorted(forward), sorted(backward - forward)


def main() -> None:
    graph = module_graph()
    rooms = room_graph(graph)
    for package in PACKAGES:
        names = floors(rooms, package) if not circles(rooms) else {}
        lines = lines_of(package)
        deepest = max(floors(graph, package).values()) if not circles(graph) else 0
        print(
            f"{package}: {sum(lines.values())} lines, {len(lines)} rooms, "
            f"{max(names.values(), default=0)} floors, {deepest} files deep"
        )
        for name in sorted(lines, key=lambda n: (-names.get(n, 0), n)):
            print(f"  floor {names.get(name, 0):>2}  {lines[name]:>5}  {name}")
    print(f"circles of files: {circles(graph) or 'none'}")
    print(f"circles of rooms: {circles(rooms) or 'none'}")
    forward, backward = executed_files()
    print(f"a forward of linear_logprob runs {len(forward)} files: {', '.join(forward)}")
    print(f"its backward {len(backward)} more: {', '.join(backward)}")


if __name__ == "__main__":
    main()

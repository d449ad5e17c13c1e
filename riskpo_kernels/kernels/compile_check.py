"""`python -m riskpo_kernels.kernels.compile_check`: compile every configuration ahead of time.

For sm_80, sm_90 and sm_100, or any --arch (AMD's by name, gfx942), without a GPU. Fails on a
register spill, on shared memory over the limit, on an unreadable compiler log, and (16-bit inputs)
on a tl.dot that does not use the matrix units as the architecture has them, a kernel named for TMA
without a bulk copy, or (sm_90) a forward whose step multiplies anything but its tile, once, or a
pass over logits that takes more instructions a logit than MOST.

The compiler is told which sizes are multiples of 16, as the JIT tells it: all of them, as in nearly
every model; and for the first and the last configuration of each kernel all but those that hang on
V ("ragged"). With other widths the results are right but slower, and the sparse products spill up
to 480 bytes. Prints one line per kernel and architecture, `--verbose` one per configuration: most
registers and spills, shared memory, matrix (HMMA, HGMMA, UTCHMMA, MFMA) and bulk-copy (UTMALDG)
instructions, and the others per logit.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import multiprocessing
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from riskpo_kernels.kernels.machine_code import (
    BULK_COPY,
    Arch,
    instructions,
    machine_code,
    matrix_instruction,
    multiply_adds,
    resources,
)

MODULES = (
    "softmax_rows",
    "head_forward",
    "dense_gradient",
    "finish_rows",
    "divergence_tiles",
    "live_rows",
    "support_pairs",
    "support_gradient",
    "sparse_blocks",
    "sparse_hidden",
    "sparse_weight",
)
ARCHS: tuple[Arch, ...] = (80, 90, 100)
# Bytes per block; of other architectures what consumer cards have since sm_86
SHARED_LIMIT: dict[Arch, int] = {80: 166912, 90: 232448, 100: 232448, "gfx942": 65536}
SHARED_LIMIT["gfx950"] = 163840
SMALLEST_LIMIT = 101376
PROGRESS = 50  # configurations between two lines that say how far it is
MOST = {"forward": 20.0, "rows": 26.0}  # instructions per logit on sm_90, without a softcap's tanh
# Sizes that hang on the vocabulary: of several models no multiples of 16
RAGGED = ("V", "C", "stride_raw", "stride_out")


class Compiled(NamedTuple):
    name: str
    arch: Arch
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix: int
    bulk_copies: int
    per_logit: float
    fault: str


def kind_of(name: str) -> str:
    """The kernel of a configuration: the first word of its name, without what it writes to."""
    return name.split()[0].split("->")[0]


def configurations(module: str) -> list:
    """A module's own, and the first and last one of each of its kernels with ragged sizes."""
    given = importlib.import_module(f"{__package__}.{module}").compile_configurations()
    ends: dict[str, list] = {}
    for c in given:
        if any(c.signature.get(size) == "i32" for size in RAGGED):
            kind = kind_of(c.name)
            ends[kind] = [*ends.get(kind, [])[:1], c]
    both = [c for members in ends.values() for c in members]
    return given + [c._replace(name=f"{c.name} ragged", ragged=True) for c in both]


def compile_one(job: tuple[str, int, Arch]) -> Compiled:
    """Compile configuration `index` of `module` for one architecture and read the log."""
    module, index, arch = job
    configuration = configurations(module)[index]
    name, warps = configuration.name, configuration.warps
    kernel, log = _compiled(configuration, arch)
    found = resources(kernel, arch, log)
    if found is None:
        return Compiled(name, arch, *(0,) * 5, 0.0, "the compiler's log could not be read")
    looked_at = "dot" in name or name.split()[0] in ("rows", "gradient")
    code = machine_code(kernel, arch) if looked_at else ""
    matrix, copies = code.count(matrix_instruction(arch)), code.count(BULK_COPY)
    each = per_logit(name, code, configuration.constexprs, warps) if arch == 90 else 0.0
    measures = (*found, kernel.metadata.shared, matrix, copies, each)
    measured = Compiled(name, arch, *measures, "")
    done = multiply_adds(code) * warps // 4  # of every group of 4 warps
    return measured._replace(fault=fault_of(measured, configuration.constexprs, done))


def _compiled(configuration: Any, arch: Arch) -> tuple[Any, str]:
    """The compiled kernel, and what ptxas printed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, function, signature, constexprs, warps, stages, options, *_, ragged = configuration
    constants = {(function.arg_names.index(k),): v for k, v in constexprs.items()}
    told = {(i,): [["tt.divisibility", 16]] for i in aligned(function, signature, ragged)}
    source = ASTSource(function, signature, constants, told)
    options = {"num_warps": warps, "num_stages": stages} | options
    if isinstance(arch, str):
        options.pop("maxnreg", None)  # as kernels/__init__.py launches
        return triton.compile(source, target=GPUTarget("hip", arch, 64), options=options), ""
    triton.knobs.nvidia.dump_ptxas_log = True
    with tempfile.TemporaryFile("w+") as log:
        stdout = os.dup(1)
        sys.stdout.flush()
        os.dup2(log.fileno(), 1)
        try:
            kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            sys.stdout.flush()
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        log.seek(0)
        return kernel, log.read()


def aligned(function: Any, signature: dict[str, str], ragged: bool) -> set[int]:
    """The arguments of which the JIT would tell the compiler that they are multiples of 16, in a
    launch as models make it."""
    return {
        i
        for i, (p, kind) in enumerate(zip(function.params, signature.values(), strict=True))
        if (kind.startswith("*") or kind == "i32")
        and not (p.do_not_specialize or p.do_not_specialize_on_alignment)
        and not (ragged and p.name in RAGGED)
    }


def per_logit(name: str, code: str, flags: dict[str, Any], warps: int) -> float:
    """Instructions per logit of a kernel that goes over logits once, 0 for the others: of a forward
    what usually follows a tile's last step, of rows the loop of a warp along a row, else all."""
    found = instructions(code)
    if name.startswith(("forward", "dense")):
        return found.usual / (flags["BM"] * flags["BN"] / (32 * warps))
    if name.startswith("rows"):
        return found.loop / (flags["BV"] / (32 * warps))
    if name.startswith("gradient"):
        return found.whole / (flags["BN"] * flags["BV"] / (32 * warps))
    return 0.0


def fault_of(m: Compiled, flags: dict[str, Any], done: int) -> str:
    """What is wrong with a compiled kernel, or nothing; done: multiply-adds of a step."""
    kind, sixteen_bit = kind_of(m.name).split("-")[0], "bf16" in m.name or "fp16" in m.name
    if m.shared_bytes > SHARED_LIMIT.get(m.arch, SMALLEST_LIMIT):
        return f"{m.shared_bytes} bytes of shared memory"
    if m.spill_bytes:
        return f"{m.spill_bytes} bytes of register spills"
    if "dot" in m.name and sixteen_bit and not m.matrix:
        return f"no {matrix_instruction(m.arch)} in the machine code"
    if "tma" in m.name and not m.bulk_copies:
        return f"no {BULK_COPY} in the machine code"
    if m.arch != 90:
        return ""
    tile = math.prod(flags.get(key, 0) for key in ("BM", "BN", "BK"))
    if kind in ("forward", "dense") and sixteen_bit and done != tile:
        return f"{done} multiply-adds a step, of a tile of {tile}"
    if "inner" in flags and m.per_logit > MOST.get(kind, math.inf):
        return f"{m.per_logit:.1f} instructions per logit, of {MOST[kind]:.0f} at most"
    return ""


def jobs_for(archs: Sequence[Arch], part: str) -> list[tuple[str, int, Arch]]:
    """Every configuration whose name contains `part`, where it can be launched."""
    return [
        (module, index, arch)
        for module in MODULES
        for index, configuration in enumerate(configurations(module))
        for arch in archs
        if part in configuration.name and (not configuration.archs or arch in configuration.archs)
    ]


def first_of_each(jobs: list[tuple[str, int, Arch]]) -> list[tuple[str, int, Arch]]:
    """The first job of every kernel and architecture."""
    names = {module: [c.name for c in configurations(module)] for module in MODULES}
    kept: dict[tuple[str, Arch], tuple[str, int, Arch]] = {}
    for module, index, arch in jobs:
        kept.setdefault((kind_of(names[module][index]), arch), (module, index, arch))
    return list(kept.values())


def arch_of(given: str) -> Arch:
    """An architecture as it is written: 90, gfx942."""
    return int(given) if given.isdigit() else given


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=arch_of, nargs="*", default=ARCHS)
    parser.add_argument("--kernel", default="", help="only names that contain this")
    parser.add_argument("--quick", action="store_true", help="one configuration of each kernel")
    parser.add_argument("--verbose", action="store_true", help="one line per configuration")
    options = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        print("compile check: skipped, triton is not installed on this platform")
        return 0
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have nothing to compile
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # a cached kernel leaves no log to read
    jobs = jobs_for(options.arch, options.kernel)
    if options.quick:
        jobs = first_of_each(jobs)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        rows = []
        for row in pool.imap(compile_one, jobs, chunksize=4):
            rows.append(row)
            if len(rows) % PROGRESS == 0:
                print(f"compile check: {len(rows)} of {len(jobs)} compiled", flush=True)
    groups = defaultdict(list)
    for row in rows:
        groups[row.name if options.verbose else kind_of(row.name), row.arch].append(row)
    line = "{:<62} {:>6} {:>8} {:>10} {:>9} {:>9} {:>7} {:>8} {:>9}"
    heads = ("kernel", "arch", "configs", "registers", "spills B", "shared B", "matrix", "UTMALDG")
    print(line.format(*heads, "per logit"))
    for (name, arch), members in groups.items():
        *most, each = (max(getattr(m, key) for m in members) for key in Compiled._fields[2:8])
        print(line.format(name, _named(arch), len(members), *most, f"{each:.1f}" if each else ""))
    faults = [row for row in rows if row.fault]
    for row in faults:
        print(f"FAULT {_named(row.arch)} {row.name}: {row.fault}")
    print(f"compile check: {len(rows) - len(faults)} passed, {len(faults)} failed")
    return 1 if faults else 0


def _named(arch: Arch) -> str:
    return arch if isinstance(arch, str) else f"sm_{arch}"


if __name__ == "__main__":
    sys.exit(main())

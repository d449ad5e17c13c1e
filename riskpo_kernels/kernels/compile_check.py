"""`python -m riskpo_kernels.kernels.compile_check`: compile every configuration ahead of time.

For sm_80, sm_90 and sm_100, without a GPU. Fails on a register spill, on shared memory over the
limit, on an unreadable compiler log, and (16-bit inputs) on a tl.dot that does not use the tensor
cores as sm_90 and sm_100 have them, a kernel named for TMA without a bulk copy, or (sm_90) a
forward whose step multiplies anything but its tile, once. Widths and strides are taken as multiples
of 16, as models have them: others are right but slower, and the sparse products spill up to 480
bytes. Prints one line per kernel and architecture, `--verbose` one per configuration: most
registers and spills, shared memory, and how many matrix (HMMA, HGMMA, UTCHMMA) and bulk-copy
(UTMALDG) instructions there are.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from typing import NamedTuple

MODULES = (
    "softmax_rows",
    "head_forward",
    "finish_rows",
    "live_rows",
    "sparse_blocks",
    "sparse_hidden",
    "sparse_weight",
)
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}  # bytes per block
SMALLEST_LIMIT = 101376  # of other architectures: consumer cards since sm_86
PROGRESS = 50  # configurations between two lines that say how far it is
LOG = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
MATRIX = {90: "HGMMA", 100: "UTCHMMA"}  # what a 16-bit tl.dot should become, else HMMA
BULK_COPY = "UTMALDG"
HGMMA = re.compile(r"\bHGMMA\.(\d+x\d+x\d+)")


class Compiled(NamedTuple):
    name: str
    arch: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix: int
    bulk_copies: int
    fault: str


def configurations(module: str) -> list:
    return importlib.import_module(f"riskpo_kernels.kernels.{module}").compile_configurations()


def compile_one(job: tuple[str, int, int]) -> Compiled:
    """Compile configuration `index` of `module` for one architecture and read the log."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, index, arch = job
    name, function, signature, constexprs, warps, stages, options, _ = configurations(module)[index]
    names = function.arg_names
    # pointers, strides and the width are multiples of 16 in practice: without this loads are scalar
    aligned = {
        (names.index(a),): [["tt.divisibility", 16]]
        for a, kind in signature.items()
        if (kind.startswith("*") or a.startswith("stride") or a == "D")
        and not function.params[names.index(a)].do_not_specialize_on_alignment
    }
    source = ASTSource(
        function, signature, {(names.index(k),): v for k, v in constexprs.items()}, aligned
    )
    triton.knobs.nvidia.dump_ptxas_log = True
    with tempfile.TemporaryFile("w+") as log:
        stdout = os.dup(1)
        sys.stdout.flush()
        os.dup2(log.fileno(), 1)
        try:
            kernel = triton.compile(
                source,
                target=GPUTarget("cuda", arch, 32),
                options={"num_warps": warps, "num_stages": stages} | options,
            )
            sys.stdout.flush()
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        log.seek(0)
        text = log.read()
    spills, registers = LOG.search(text), REGISTERS.search(text)
    if spills is None or registers is None:
        return Compiled(name, arch, 0, 0, 0, 0, 0, "the compiler's log could not be read")
    spilled = int(spills[1]) + int(spills[2])
    code = machine_code(kernel) if "dot" in name else ""  # the others have nothing to look for
    instruction = MATRIX.get(arch, "HMMA")
    matrix, copies = code.count(instruction), code.count(BULK_COPY)
    fault = f"{spilled} bytes of register spills" if spilled else ""
    if kernel.metadata.shared > SHARED_LIMIT.get(arch, SMALLEST_LIMIT):
        fault = f"{kernel.metadata.shared} bytes of shared memory"
    sixteen_bit = "bf16" in name or "fp16" in name
    if "dot" in name and sixteen_bit and not matrix:
        fault = f"no {instruction} in the machine code"
    tile = [constexprs.get(key, 0) for key in ("BM", "BN", "BK")]
    if arch == 90 and name.startswith("forward") and sixteen_bit:
        done = multiply_adds(code) * warps // 4  # of every group of 4 warps
        if done != math.prod(tile):
            fault = f"{done} multiply-adds a step, of a tile of {math.prod(tile)}"
    if "tma" in name and not copies:
        fault = f"no {BULK_COPY} in the machine code"
    measures = (int(registers[1]), spilled, kernel.metadata.shared, matrix, copies)
    return Compiled(name, arch, *measures, fault)


def multiply_adds(code: str) -> int:
    """Of the HGMMA instructions in SASS, each executed once by a group of 4 warps."""
    return sum(math.prod(map(int, sizes.split("x"))) for sizes in HGMMA.findall(code))


def machine_code(kernel) -> str:
    """The SASS of a compiled kernel."""
    import triton

    tool = triton.knobs.nvidia.nvdisasm.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    return sass.stdout


def first_of_each(jobs: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The first job of every kernel (the first word of a configuration's name) and architecture."""
    kept: dict[tuple[str, int], tuple[str, int, int]] = {}
    for module, index, arch in jobs:
        kept.setdefault(
            (configurations(module)[index].name.split()[0], arch), (module, index, arch)
        )
    return list(kept.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="*", default=sorted(SHARED_LIMIT))
    parser.add_argument("--kernel", default="", help="only names that contain this")
    parser.add_argument("--quick", action="store_true", help="one configuration of each kernel")
    parser.add_argument("--verbose", action="store_true", help="one line per configuration")
    options = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        print("compile check: skipped, triton is not installed on this platform")
        return 0
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have nothing to compile
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # a cached kernel leaves no log to read
    jobs = [
        (module, index, arch)
        for module in MODULES
        for index, configuration in enumerate(configurations(module))
        for arch in options.arch
        if options.kernel in configuration.name
        and (not configuration.archs or arch in configuration.archs)
    ]
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
        groups[row.name if options.verbose else row.name.split()[0], row.arch].append(row)
    line = "{:<62} {:>6} {:>8} {:>10} {:>9} {:>9} {:>7} {:>8}"
    heads = ("kernel", "arch", "configs", "registers", "spills B", "shared B", "matrix", "UTMALDG")
    print(line.format(*heads))
    for (name, arch), members in groups.items():
        most = [max(getattr(m, key) for m in members) for key in Compiled._fields[2:7]]
        print(line.format(name, f"sm_{arch}", len(members), *most))
    faults = [row for row in rows if row.fault]
    for row in faults:
        print(f"FAULT sm_{row.arch} {row.name}: {row.fault}")
    print(f"compile check: {len(rows) - len(faults)} passed, {len(faults)} failed")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

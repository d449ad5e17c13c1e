"""What a compiled kernel is made of: registers, spills, matrix and copy instructions, and how many
instructions a logit takes. Read from SASS (ptxas's log beside it) and from AMD's assembler text.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
VGPRS = re.compile(r"\.vgpr_count:\s+(\d+)\s+\.vgpr_spill_count:\s+(\d+)")
HGMMA = re.compile(r"\bHGMMA\.(\d+x\d+x\d+)")
MATRIX = {90: "HGMMA", 100: "UTCHMMA"}  # what a 16-bit tl.dot should become, else HMMA
BULK_COPY = "UTMALDG"
LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(.+?)\s*;")
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
JUMP = re.compile(r"\bBRA(?:\.\S+)?\s.*?`\((\.L_x_\d+)\)")
Arch = int | str  # 10 x compute capability, or AMD's name


class Resources(NamedTuple):
    """Of a thread; spilled in bytes."""

    registers: int
    spilled: int


def matrix_instruction(arch: Arch) -> str:
    return "v_mfma" if isinstance(arch, str) else MATRIX.get(arch, "HMMA")


def resources(kernel: Any, arch: Arch, log: str) -> Resources | None:
    """None where the compiler does not say."""
    if isinstance(arch, str):
        found = VGPRS.search(kernel.asm["amdgcn"])
        return None if found is None else Resources(int(found[1]), 4 * int(found[2]))
    spills, registers = SPILLS.search(log), REGISTERS.search(log)
    if spills is None or registers is None:
        return None
    return Resources(int(registers[1]), int(spills[1]) + int(spills[2]))


def machine_code(kernel: Any, arch: Arch) -> str:
    """SASS, or AMD's assembler text."""
    if isinstance(arch, str):
        return kernel.asm["amdgcn"]
    import triton

    tool = triton.knobs.nvidia.nvdisasm.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    return sass.stdout


def multiply_adds(code: str) -> int:
    """Of the HGMMA instructions in SASS, each executed once by a group of 4 warps."""
    return sum(math.prod(map(int, sizes.split("x"))) for sizes in HGMMA.findall(code))


class Count(NamedTuple):
    """Instructions in SASS, padding left out. loop: of the longest loop; tail: of the longest
    stretch in it that a jump passes over (in one loop over the steps of all tiles, what follows a
    tile's last step), without it the loop; usual: of that, what no shorter jump passes over."""

    whole: int
    loop: int
    tail: int
    usual: int


def instructions(code: str) -> Count:
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    count = 0
    for line in code.splitlines():
        label, found = LABEL.match(line), LINE.match(line)
        if label is not None:
            labels[label[1]] = count
        elif found is not None and not found[1].startswith("NOP"):
            count += 1
            jump = JUMP.search(found[1])
            if jump is not None:
                jumps.append((count, jump[1]))
    stretches = [(i, labels[to]) for i, to in jumps if to in labels]
    back = [(to, i) for i, to in stretches if to < i]
    first, last = max(back, key=lambda x: x[1] - x[0], default=(0, count))
    ahead = sorted(x for x in stretches if first <= x[0] < x[1] <= last)
    start, stop = max(ahead, key=lambda x: x[1] - x[0], default=(first, last))
    usual, at = stop - start, start
    for i, to in ahead:
        if start <= i and to <= stop and 2 * (to - i) < stop - start:
            usual -= max(0, to - max(i, at))
            at = max(at, to)
    return Count(count, last - first, stop - start, usual)

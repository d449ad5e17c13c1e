"""What this machine has, which backend runs where, and whether each computes the right numbers."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping

import torch

from riskpo.doctor.check import Check, first_line
from riskpo.doctor.packages import version
from riskpo.doctor.problem import Problem, Yardstick, make_problem, ours, plain
from riskpo_kernels import backend_report

PACKAGES = (
    "riskpo", "torch", "triton", "transformers", "trl", "liger-kernel", "verl", "flash-attn",
    "vllm", "peft", "math-verify",
)  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WRONG = (
    "Run doctor again with OMP_NUM_THREADS=1. If this fails again, do not train with this backend "
    "and dtype here, and report this line with the versions above."
)
REMEDY = {
    "torch": WRONG,
    "reference": WRONG,
    "triton": "Use backend='torch' meanwhile, clear ~/.triton/cache, match triton to torch.",
}


def versions() -> dict[str, str]:
    """Python, the machine and every package that matters here, by name."""
    found = {"python": platform.python_version(), "machine": platform.platform()}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["gpu"] = ", ".join(gpus) or "none"
    return found | {name: version(name) for name in PACKAGES}


def machine_checks() -> Iterator[Check]:
    """Backends and why, then float64 checks of every backend and dtype that can run here."""
    for row in backend_report():
        yield Check(True, f"{row.op} on {row.device}: {row.backend} ({row.reason})")
    cuda = torch.cuda.is_available()
    for backend in ("reference", "torch", *(("triton",) if cuda else ())):
        for name in DTYPES:
            yield numerics(backend, name, "cuda" if cuda else "cpu")
    if not cuda:
        yield from interpreted()
    yield compiled()


def numerics(backend: str, dtype: str, device: str, problem: Problem | None = None) -> Check:
    """Every result of head and loss against float64, by the rule of riskpo/doctor/tolerance.py."""
    problem = problem or make_problem(bias=True)
    yard = Yardstick.of(problem, plain(problem.to(DTYPES[dtype]), logits32=True))
    what = f"{backend} {dtype} on {device}"
    try:
        moved = problem.to(DTYPES[dtype]).on(device)
        got = ours(moved, backend=backend)
    except Exception as error:  # any failure of a backend is the finding
        return Check(False, f"{what}: {first_line(error, 160)}", REMEDY[backend])
    seen = {name: yard.bounds(name, got[name]) for name in yard.truth}
    bad = [name for name, metrics in seen.items() if not all(m.holds for m in metrics)]
    line = ", ".join(f"{name} {norm.error:.0e}" for name, (norm, _) in seen.items())
    if bad:
        return Check(False, f"{what}: {', '.join(bad)} beyond the limit ({line})", REMEDY[backend])
    return Check(True, f"{what}: relative errors against float64: {line}")


def interpreted() -> Iterator[Check]:
    """The Triton kernels by their interpreter, in a process of its own: no GPU is needed."""
    if version("triton") == "not installed":
        yield Check(None, "triton: not installed on this platform; the torch backend runs instead")
        return
    yield Check(None, "triton on a GPU: no GPU here; below the kernels run in the interpreter")
    for dtype in ("fp32", "fp16"):
        code = (
            "from riskpo.doctor.machine import numerics; "
            f"c = numerics('triton', '{dtype}', 'cpu'); print(c.text); raise SystemExit(not c.ok)"
        )
        command = [sys.executable, "-c", code]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        what = f"interpreter, triton {dtype} on cpu"
        yield in_process(command, 300, what, "interpreter, {}", environment)


def compiled() -> Check:
    """One configuration of each Triton kernel through the compiler, for this GPU or for sm_90."""
    if version("triton") == "not installed":
        return Check(None, "compile check: triton is not installed on this platform")
    arch = "90"
    if torch.cuda.is_available():
        arch = "".join(map(str, torch.cuda.get_device_capability()))
    command = [sys.executable, "-m", "riskpo_kernels.kernels.compile_check", "--quick"]
    line = f"{{}}, sm_{arch}, one of each kernel"
    return in_process([*command, "--arch", arch], 600, f"compile check, sm_{arch}", line)


def in_process(
    command: list[str],
    seconds: int,
    what: str,
    line: str,
    environment: Mapping[str, str] | None = None,
) -> Check:
    """A check in a process of its own: its last line within `line`, or that it took too long."""
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        late = f"{what}: not finished within {seconds} s, so nothing is known of its numbers"
        return Check(None, late, "Run doctor again while the machine has less to do.")
    last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
    ok = done.returncode == 0
    return Check(ok, line.format(last.strip()), "" if ok else REMEDY["triton"])

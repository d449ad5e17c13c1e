"""The facts that every result carries: machine, versions, date, command."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import riskpo_kernels

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "fla-core",
    "verl",
)
ROOT = Path(__file__).resolve().parents[1]


def describe(device: str) -> dict[str, Any]:
    """Facts of this machine and its software."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command(),
        "riskpo_kernels": riskpo_kernels.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "packages": _versions(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": list(torch.cuda.get_device_capability(0)),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    return facts


def command() -> str:
    """The command as typed, folders of arguments left out."""
    words = [w if not w.startswith("/") else Path(w).name for w in sys.argv[1:]]
    return f"python -m benchmarks {shlex.join(words)}".strip()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}


def _answer(*words: str) -> str | None:
    if shutil.which(words[0]) is None:
        return None
    try:
        run = subprocess.run(words, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip().splitlines()[0] if run.returncode == 0 and run.stdout else None


def _commit() -> str | None:
    commit = _answer("git", "rev-parse", "--short=12", "HEAD")
    dirty = _answer("git", "status", "--porcelain", "--", "riskpo_kernels", "benchmarks")
    return f"{commit}+changes" if commit and dirty else commit


def _driver() -> str | None:
    return _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()

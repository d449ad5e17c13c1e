"""riskpo_kernels as a kernel of the Hugging Face Hub: python -m tools.hub_kernel FOLDER

FOLDER gets build.toml and torch-ext/riskpo_kernels, of which kernel-builder makes the variants
without compiled code (torch-cpu, torch-cuda). A Hub kernel is loaded under a name of its own,
several versions beside each other, so its files import each other relatively: that is what is
changed here.
Operators keep one namespace and are told apart by a hash of the sources (core/operators.py).
kernel-builder itself, which wants Nix, and an upload are left to whoever publishes.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "riskpo_kernels"
OWN = re.compile(rf"^(\s*)from {NAME}(\.[\w.]+)? import ", re.MULTILINE)
BUILD = """[general]
name = "riskpo-kernels"
version = 0
edition = 6
license = "Apache-2.0"
backends = ["cpu", "cuda"]

[torch-noarch]
"""


def relative(text: str, path: Path) -> str:
    """The source of riskpo_kernels/`path` with its own package named by dots."""
    dots = "." * len(path.parts)
    return OWN.sub(lambda m: f"{m[1]}from {dots}{(m[2] or '').removeprefix('.')} import ", text)


def write(folder: Path) -> Path:
    """The layout in `folder`, replaced where it is there; returns the package's place."""
    package = folder / "torch-ext" / NAME
    shutil.rmtree(package, ignore_errors=True)
    for source in sorted((ROOT / NAME).rglob("*.py")):
        path = source.relative_to(ROOT / NAME)
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        text = relative(source.read_text(encoding="utf-8"), path)
        (package / path).write_text(text, encoding="utf-8")
    (folder / "build.toml").write_text(BUILD, encoding="utf-8")
    return package


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="is made")
    print(write(parser.parse_args().folder))

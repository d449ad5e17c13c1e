"""The names of a run's files, and atomic writing."""

from __future__ import annotations

import json
import os
from pathlib import Path

# in run_dir
METRICS, TEXTS, SETTINGS, NOTES = "metrics.jsonl", "rollouts.jsonl", "config.toml", "notes.txt"


def run_dir(out: Path, system: str, seed: int) -> Path:
    """Folder of one run of a comparison."""
    return out / system / f"seed-{seed}"


def write_text(path: str | Path, text: str) -> Path:
    """Write atomically: a reader finds the old content or the new. Makes missing folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    flush(unfinished)
    unfinished.replace(path)
    return path


def write_json(path: str | Path, content: object) -> Path:
    """`write_text` of the content as indented JSON."""
    return write_text(path, json.dumps(content, indent=1) + "\n")


def check_folder(run_dir: str) -> None:
    """Make `run_dir`; ValueError or OSError if it cannot be made or written to."""
    path = Path(run_dir)
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(
            f"run_dir: nothing can be written into {run_dir}. Choose another one, or change its "
            "permissions."
        )


def check_out(out: str | None) -> None:
    """ValueError or OSError if the file `out`, written at the end of a command, cannot be."""
    if out is not None:
        if Path(out).is_dir():
            raise ValueError(f"out: {out} is a folder; expected a file. Add a name to it.")
        check_folder(str(Path(out).parent))


def flush(path: Path) -> None:
    """fsync a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints: all or nothing on disk, and everything that a bitwise resume needs.

    run_dir/checkpoints/step_000100/
        model.safetensors, config.json, tokenizer files   loadable with from_pretrained
        trainer.pt     optimiser, schedule, advantage, random states
        trainer.json   step and the settings of the run

A folder is written under a temporary name, flushed to the disk and renamed; a crash leaves the
previous checkpoint in place. The last two are kept. The data cursor is the step itself: which
questions a step sees, and its random numbers, are functions of (seed, step).
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from riskpo.config import TrainConfig, changed_fields
from riskpo.trainee import like_shard, whole_tree

KEEP = 2


def save_checkpoint(
    run_dir: str | Path,
    *,
    step: int,
    trainee: Any,
    tokenizer: Any,
    optimizer: Any,
    advantage: Any,
    config: TrainConfig,
) -> Path:
    """Write step's checkpoint atomically, drop all but the last two; returns its folder.

    Every process calls it, the first one writes: whole weights and states, whatever the number of
    processes, so that any number may resume.
    """
    folder = Path(run_dir) / "checkpoints"
    final, unfinished = folder / f"step_{step:06d}", folder / f".unfinished_{step:06d}"
    state = {
        "optimizer": whole_tree(optimizer.state_dict()),
        "advantage": advantage.state_dict(),
        "random": _random_states(),
    }
    weights = trainee.state_dict()
    if weights is None:
        return final
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    trainee.model.save_pretrained(unfinished, state_dict=weights)
    tokenizer.save_pretrained(unfinished)
    torch.save(state, unfinished / "trainer.pt")
    about = {"step": step, "config": dataclasses.asdict(config)}
    (unfinished / "trainer.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for path in unfinished.iterdir():
        _flush(path)
    _flush(unfinished)
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)
    _flush(folder)
    for old in _finished(run_dir)[:-KEEP]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None; half-written ones are removed."""
    for rest in (Path(run_dir) / "checkpoints").glob(".unfinished_*"):
        shutil.rmtree(rest)
    finished = _finished(run_dir)
    return finished[-1] if finished else None


def read_about(checkpoint: Path, config: TrainConfig) -> int:
    """The checkpoint's step; ValueError when the settings are not those it was written with."""
    about = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))
    changed = changed_fields(about["config"], config)
    if changed:
        raise ValueError(
            f"resume: {checkpoint.parent.parent} was started with other settings "
            f"({'; '.join(changed)}). Restore them, or choose another run_dir for a new run."
        )
    return int(about["step"])


def restore(checkpoint: Path, *, optimizer: Any, advantage: Any) -> None:
    """Load everything but the weights, which from_pretrained has read, and the random states."""
    state = torch.load(checkpoint / "trainer.pt", weights_only=True, map_location="cpu")
    optimizer.load_state_dict(laid_out(state["optimizer"], optimizer))
    advantage.load_state_dict(state["advantage"])
    _set_random_states(state["random"])


def laid_out(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """The optimiser's whole state, each tensor sharded as the weight it belongs to is now."""
    adamw = dict(state["adamw"])
    adamw["state"] = {
        i: {name: like_shard(x, optimizer.masters[i]) for name, x in moments.items()}
        for i, moments in adamw["state"].items()
    }
    copies = [like_shard(x, m) for x, m in zip(state["masters"], optimizer.masters, strict=True)]
    return state | {"adamw": adamw, "masters": copies}


def truncate_log(path: Path, step: int) -> None:
    """Keep the complete lines of a JSONL log up to `step`: the others will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text("".join(kept), encoding="utf-8")
    _flush(unfinished)
    unfinished.replace(path)


def set_aside(path: Path) -> None:
    """Rename the log of a run that left no checkpoint: it starts over and writes a new one."""
    if path.exists():
        path.replace(path.with_suffix(".previous" + path.suffix))


def _finished(run_dir: str | Path) -> list[Path]:
    return sorted((Path(run_dir) / "checkpoints").glob("step_*"))


def _random_states() -> dict[str, Any]:
    name, keys, place, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys)), place, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

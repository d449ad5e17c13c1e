"""Checkpoints: written atomically, with everything that a bitwise resume needs.

    run_dir/checkpoints/step_000100/
        model.safetensors, config.json, tokenizer files   loadable with from_pretrained
        trainer.pt     optimiser, schedule, advantage, random states
        trainer.json   step and the settings of the run

A folder is written under a temporary name, flushed to the disk and renamed, so a crash leaves the
previous checkpoint in place. The last two are kept. Only the run that locks the folder removes
anything. There is no data cursor: the questions and random numbers of a step are functions of
(seed, step).
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from riskpo.config import TrainConfig, changes, locked
from riskpo.distributed import like_shard, to_first
from riskpo.files import flush, write_text

KEEP = 2
UNFINISHED = ".unfinished_"


def save_checkpoint(
    run_dir: str | Path,
    *,
    step: int,
    parallel: Any,
    tokenizer: Any,
    optimizer: Any,
    advantage: Any,
    config: TrainConfig,
) -> Path:
    """Write the checkpoint of `step` atomically, drop all but the last two, return its folder.

    Every process calls; the first gathers whole weights and states on its CPU and writes them, so
    that any number of processes can resume. OSError in every process if writing fails; the previous
    checkpoint then stays.
    """
    state = {
        "optimizer": to_first(optimizer.state_dict(), parallel.ranks),
        "advantage": advantage.state_dict(),
        "random": _random_states(),
    }
    weights = parallel.state_dict()
    about = {"step": step, "config": dataclasses.asdict(located(config))}

    def write(folder: Path) -> None:
        parallel.model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        torch.save(state, folder / "trainer.pt")
        text = json.dumps(about, indent=1) + "\n"
        (folder / "trainer.json").write_text(text, encoding="utf-8")

    return parallel.ranks.first(lambda: _finish(Path(run_dir), step, write))


def _finish(run_dir: Path, step: int, write: Callable[[Path], None]) -> Path:
    """Let `write` fill the checkpoint's folder, which has another name until it is complete."""
    folder = run_dir / "checkpoints"
    final, unfinished = folder / f"step_{step:06d}", folder / f"{UNFINISHED}{step:06d}"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        write(unfinished)
        for path in unfinished.iterdir():
            flush(path)
        flush(unfinished)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        flush(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # as the writers put a full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        last, reason = latest_checkpoint(run_dir), str(error).partition("\n")[0]
        raise OSError(
            f"checkpoint: cannot write step {step} to {folder} ({reason}; "
            f"{shutil.disk_usage(run_dir).free >> 20} MiB are free there). The last checkpoint is "
            f"{last.name if last else 'none'}. Make room and give the same command again."
        ) from error
    for old in _finished(run_dir)[:-KEEP]:
        shutil.rmtree(old)
    return final


@contextmanager
def owned(folder: str | Path) -> Iterator[None]:
    """Make `folder`, lock it for this process, and remove checkpoints that a crash left unfinished.

    ValueError if another process holds the lock, which it names, or if the folder cannot be made.
    The lock ends with its process, however that ends.
    """
    import fcntl

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"run_dir: cannot write to {folder} ({error.strerror}). Choose another folder."
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"run_dir: {folder} is in use by {file.read().strip() or 'another process'}. Wait "
                "until that ends, end it, or choose another folder."
            ) from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        for rest in (folder / "checkpoints").glob(UNFINISHED + "*"):
            shutil.rmtree(rest)
        yield


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. Changes nothing."""
    finished = _finished(run_dir)
    return finished[-1] if finished else None


def located(config: TrainConfig) -> TrainConfig:
    """`config` with absolute paths of model, teacher and data; names that are no paths stay."""
    names = {name: getattr(config, name) for name in ("model", "teacher", "data", "eval_data")}
    found: dict[str, Any] = {
        k: str(Path(v).resolve()) for k, v in names.items() if v and Path(v).exists()
    }
    return dataclasses.replace(config, **found)


def read_about(
    checkpoint: Path, config: TrainConfig, note: Callable[[str], None] = lambda text: None
) -> int:
    """The checkpoint's step. ValueError if settings changed that a resumed run may not change.

    Settings that change only roundings are noted. Paths are compared by the place they name.
    """
    about = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))
    given, now = changes(about["config"], config), changes(about["config"], located(config))
    changed = {name: given[name] for name in given if name in now}
    refused = [text for name, text in changed.items() if locked(name, text)]
    if refused:
        raise ValueError(
            f"resume: {checkpoint.parent.parent} was started with other settings "
            f"({'; '.join(refused)}). Restore them, or choose another run_dir for a new run."
        )
    if changed:
        note(
            f"resume: {'; '.join(changed.values())}: the run goes on, but no longer bit for bit as "
            "it would have without the change"
        )
    return int(about["step"])


def restore(checkpoint: Path, *, optimizer: Any, advantage: Any) -> None:
    """Restore optimiser, advantage and random states; from_pretrained has loaded the weights."""
    path = checkpoint / "trainer.pt"  # mapped, so that each process reads its shards alone
    state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    saved, masters = state["optimizer"], optimizer.masters
    saved["adamw"]["state"] = {
        i: {name: like_shard(x, masters[i]) for name, x in moments.items()}
        for i, moments in saved["adamw"]["state"].items()
    }
    saved["masters"] = [like_shard(x, m) for x, m in zip(saved["masters"], masters, strict=True)]
    optimizer.load_state_dict(saved)
    advantage.load_state_dict(state["advantage"])
    _set_random_states(state["random"])


def truncate_log(path: Path, step: int) -> None:
    """Cut a JSONL log after `step`, and drop an incomplete line: the run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    write_text(path, "".join(kept))


def set_aside(path: Path) -> None:
    """Rename the log of a run that left no checkpoint, so that the new run starts its own."""
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

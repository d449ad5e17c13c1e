"""`riskpo compare`: algorithms side by side, each on the same seeds, starts and budgets.

    riskpo compare CONFIG.toml --algorithms grpo,dapo,riskpo-paper,riskpo-loo+omega=0 --seeds 0-4

A system is an algorithm and its own settings: a row of riskpo/algorithms.py or a table
[systems.NAME] of the TOML file, with further settings after each "+". Every run is a `riskpo train`
run in OUT/SYSTEM/seed-S. Finished runs are kept and interrupted ones resume.

A table [margins] names the primary outcomes, each with the largest difference that does not matter.
The page then says for each system which of them are decided.

With the embedded model, each seed is warmed up once and every system starts from that checkpoint,
so that differences between systems can be taken seed by seed. riskpo/compare/page.py writes the
page (table and picture).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w

from riskpo.config import (
    TrainConfig,
    is_embedded,
    load_toml,
    resolve,
    tomllib,
    validate,
    with_settings,
)
from riskpo.errors import loading, refusals_in_one_line
from riskpo.files import METRICS, check_folder, run_dir
from riskpo.preflight import check_algorithm, check_data, check_model
from riskpo.report.progress import FIRST_S, quiet_loading_bars, spoken, told

START = "start"  # folder of the warm starts, beside the systems'
START_DEPENDS_ON = ("seed", "data", "eval_questions", "temperature", "max_response_tokens", "dtype")


def compare_command(given: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="riskpo compare", description=__doc__.split("\n")[0])
    default = "(default: %(default)s)"
    add = parser.add_argument
    add("config", nargs="?", help="TOML of `riskpo train` settings that all systems share")
    add("--algorithms", required=True, help="systems to train, e.g. grpo,riskpo-loo+omega=0")
    add("--seeds", default="0-4", help=f"0-4 or 0,1,7 {default}")
    add("--steps", type=int, help="steps per run, instead of the config's; runs with more are kept")
    add("--out", default="runs/compare", help=f"folder for the runs and the page {default}")
    add("--page", default="compare", help=f"file name of the .md, .json and .png {default}")
    add("--against", help="system to subtract from the others (default: the first)")
    add("--jobs", type=int, default=1, help=f"runs at a time {default}")
    add("--page-only", action="store_true", help="write the page from finished runs, train nothing")
    with refusals_in_one_line(parser.prog):
        a = parser.parse_args(given)
    base, named, margins = read_config(a.config)
    base = base if a.steps is None else replace(base, steps=a.steps)
    names = [spec.strip() for spec in a.algorithms.split(",")]
    systems = {name: parse_system(name, named) for name in names}
    seeds = parse_seeds(a.seeds)
    against = a.against or names[0]
    if against not in systems:
        raise ValueError(
            f"compare: got against={against!r}; expected one of {', '.join(systems)}. Add it to "
            "--algorithms."
        )
    if a.jobs < 1:
        raise ValueError(f"compare: got jobs={a.jobs}; expected at least 1. Raise it.")
    out = Path(a.out)
    configs = {} if a.page_only else settings_of_all(base, systems, seeds, out)
    loading("compare")
    if configs:
        from riskpo.trainer.checkpoint import owned

        with owned(out):
            run_all(base, configs, seeds, out, jobs=a.jobs)
    from riskpo.compare.page import write_page

    for path in write_page(out, a.page, list(systems), seeds, against, margins):
        print(path)


def read_config(
    path: str | None,
) -> tuple[TrainConfig, dict[str, dict[str, Any]], dict[str, float]]:
    """(common settings, [systems], [margins]) of a file; without one, data="embedded:mixed"."""
    if path is None:
        return TrainConfig(data="embedded:mixed"), {}, {}
    given = load_toml(path)
    systems, margins = given.pop("systems", {}), given.pop("margins", {})
    for name, margin in margins.items():
        if type(margin) not in (int, float) or not 0 < margin < float("inf"):
            raise ValueError(
                f"compare: got {name} = {margin!r} under [margins]; expected a number above 0. "
                "Write the largest difference that does not matter to you."
            )
    return with_settings(TrainConfig(), given, path), systems, margins


def parse_system(spec: str, named: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings that `name+setting=value+...` alone has, its algorithm among them; values as in
    TOML, text without quotes. named: the tables [systems.NAME]."""
    name, *changes = spec.split("+")
    settings = {"algorithm": name, **named.get(name, {})}
    for change in changes:
        setting, equals, value = change.partition("=")
        if not equals:
            raise ValueError(
                f"compare: got {change!r} in {spec!r}; expected setting=value after each '+'. "
                "Write it like riskpo-loo+omega=0."
            )
        settings[setting] = _value(value)
    check_algorithm(settings["algorithm"])
    return settings


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def parse_seeds(text: str) -> list[int]:
    """Seeds of "0-4" or "0,1,7"; ValueError for anything else, or for a repeated seed."""
    try:
        seeds: list[int] = []
        for part in text.split(","):
            first, dash, last = part.partition("-")
            seeds += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"compare: got seeds={text!r}; expected different numbers, as in 0-4 or 0,1,7. Correct "
            "the list."
        )
    return seeds


def settings_of_all(
    base: TrainConfig, systems: dict[str, dict[str, Any]], seeds: list[int], out: Path
) -> dict[tuple[str, int], TrainConfig]:
    """The settings of every system on every seed; ValueError where one of them cannot run."""
    if base.model is None and not is_embedded(base.data):
        validate(base)  # raises: data without a model
    configs = {
        (name, seed): configured(base, name, settings, seed, out)
        for seed in seeds
        for name, settings in systems.items()
    }
    for config in configs.values():
        validate(resolve(config)[0])
    check_model(base.model)
    for data in (base.data, base.eval_data):
        check_data(data, base.columns)
    check_folder(str(out))
    return configs


def run_all(
    base: TrainConfig,
    configs: dict[tuple[str, int], TrainConfig],
    seeds: list[int],
    out: Path,
    *,
    jobs: int,
) -> None:
    """Train every system on every seed, `jobs` at a time; ValueError, at the end, if any failed."""
    from riskpo.algorithms import find_strategy

    for config in configs.values():
        find_strategy(config.algorithm).advantage(config)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=end_with_parent) as pool:
        if base.model is None:
            starts = {f"start, seed {s}": partial(warm, base, s, out) for s in seeds}
            _gather(pool, "warm starts", starts, threads, {}, jobs)
        runs = {f"{name}, seed {s}": partial(train_run, c) for (name, s), c in configs.items()}
        shares = {f"{name}, seed {s}": partial(share_done, c) for (name, s), c in configs.items()}
        _gather(pool, "runs", runs, threads, shares, jobs)


def _gather(
    pool: ProcessPoolExecutor,
    what: str,
    work: Mapping[str, Callable[[], str]],
    threads: int,
    shares: Mapping[str, Callable[[], float]],
    jobs: int,
) -> None:
    """Run the jobs; print a line as each ends, and the progress in between."""
    say = partial(print, flush=True)
    say(f"compare: {len(work)} {what}")
    before = sum(share() for share in shares.values())
    waiting = {pool.submit(_quietly, do, threads): name for name, do in work.items()}
    failed = list[str]()

    def progress(passed: float) -> str:
        # in the order they were given; the pool calls the next one "running" before it is
        running = [name for future, name in waiting.items() if future.running()][:jobs]
        parts = {name: shares[name]() if name in shares else 0.0 for name in running}
        done = sum(future.done() for future in waiting) - len(failed)
        line = how_far(done, len(waiting) - len(failed), parts, passed, before)
        return line + (f"; failed: {len(failed)}" if failed else "")

    with told(progress, say, FIRST_S):
        for done, future in enumerate(as_completed(waiting), 1):
            name, error = waiting[future], future.exception()
            if error is not None:
                failed.append(f"{name}: {type(error).__name__}: {error}")
            say(f"[{done}/{len(waiting)}] {name}: {error or future.result()}")
    if failed:
        raise ValueError(
            f"compare: {len(failed)} of {len(waiting)} jobs failed; the first: {failed[0]}. Mend "
            "the cause and give the same command again: finished runs are kept."
        )


def how_far(
    done: int, count: int, running: Mapping[str, float], seconds: float, before: float = 0.0
) -> str:
    """One line of progress: jobs done, jobs running with their shares, and the time left.

    `before` is the work, in jobs, that was done when the clock started (kept and resumed runs).
    """
    names = ", ".join(f"{n} {share:.0%}" if share else n for n, share in running.items())
    over = done + sum(running.values())
    known = over - before > 0.02  # of a job: what starts up says nothing of the rest
    left = spoken(seconds / (over - before) * (count - over)) if known else ""
    estimate = f"about {left} left" if known else "no estimate yet"
    return f"compare: {done} of {count} done after {spoken(seconds)}, {estimate}; running: {names}"


def share_done(config: TrainConfig) -> float:
    """Share of the run's steps that are done, by the last line of its log."""
    path = Path(config.run_dir) / METRICS
    try:
        last = path.read_text(encoding="utf-8").rpartition("\n")[0].rpartition("\n")[2]
        return min(int(json.loads(last)["step"]) / max(config.steps, 1), 1.0)
    except (OSError, ValueError, KeyError):
        return 0.0


def end_with_parent() -> None:
    """In a worker: exit when the command is killed, so that no run goes on and locks its folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _quietly(do: Callable[[], str], threads: int) -> str:
    """In a worker: call `do` and discard what it prints; the run's folder has its log."""
    import torch

    quiet_loading_bars()
    torch.set_num_threads(min(threads, torch.get_num_threads()))  # OMP_NUM_THREADS is kept
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return do()


def configured(
    base: TrainConfig, name: str, settings: dict[str, Any], seed: int, out: Path
) -> TrainConfig:
    """A run's settings: the common ones, then those of the system `name`, then where it starts."""
    config: TrainConfig = with_settings(base, settings, name)
    config = replace(config, seed=seed, run_dir=str(run_dir(out, name, seed)))
    if config.model is None:
        start = str(out / START / f"seed-{seed}")
        config = replace(config, model=start, data=config.data or "embedded")
    return config


def warm(base: TrainConfig, seed: int, out: Path) -> str:
    """Save the embedded model of this seed after its warm start, atomically."""
    from riskpo.run import load_data, warmed_up

    config, _ = resolve(replace(base, seed=seed, data=base.data or "embedded"))
    folder = out / START / f"seed-{seed}"
    about = tomli_w.dumps({name: getattr(config, name) for name in START_DEPENDS_ON})
    if folder.is_dir():
        if (folder / "start.toml").read_text(encoding="utf-8") != about:
            raise ValueError(
                f"compare: {folder} was made with other settings (see its start.toml); expected "
                "these. Restore them or choose another --out."
            )
        return "kept"
    began = time.perf_counter()
    said: list[str] = []
    policy = warmed_up(config, load_data(config)[0], said.append)
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    policy.model.save_pretrained(unfinished)
    policy.tokenizer.save_pretrained(unfinished)
    (unfinished / "start.toml").write_text(about, encoding="utf-8")
    unfinished.rename(folder)
    return f"{said[-1]}, {time.perf_counter() - began:.0f} s"


def train_run(config: TrainConfig) -> str:
    """Train one run unless it is finished; what to print of it."""
    if finished(config):
        return "kept"
    from riskpo.train import train

    began = time.perf_counter()
    train(config)
    return f"{time.perf_counter() - began:.0f} s"


def finished(config: TrainConfig) -> bool:
    """Whether the run has all its steps; ValueError if it was made with other settings."""
    from riskpo.report.logs import read_records
    from riskpo.trainer.checkpoint import latest_checkpoint, read_about

    checkpoint = latest_checkpoint(config.run_dir)
    if checkpoint is None or read_about(checkpoint, resolve(config)[0]) < config.steps:
        return False
    logged = max((int(r["step"]) for r in read_records(config.run_dir, "step")), default=0)
    return logged >= config.steps

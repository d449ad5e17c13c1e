"""How far a long evaluation or step is, in lines that come ever more rarely."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FIRST_S = 5.0  # before the first line; later ones when the time has doubled, or after a minute
EVERY_S = 60.0
SLOW_S = 20.0  # a step that is done before has its own line only


@contextmanager
def sampling_progress(
    model: Any,
    *,
    responses: int,
    sequences: int,
    tokens: int,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[None]:
    """Around the sampling of `responses`, `sequences` at once, of at most `tokens` each.

    Counts the model's forward passes, one for every token of a batch; so the time left is that of
    responses which all run to their limit. A sampler that does not call `model` gives no lines.
    """
    total = -(-responses // max(sequences, 1)) * tokens

    def line(passed: float, done: int) -> str:
        left = passed / done * max(total - done, 0)
        share = min(done / max(total, 1), 1.0)
        return f"evaluation: {share:.0%} of the tokens at most, at most {spoken(left)} left"

    with _told(model, line, FIRST_S, say, clock):
        yield


@contextmanager
def slow_progress(
    module: Any, what: str, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """Lines of `what`, once it has taken SLOW_S seconds: how often `module` ran, and the time."""

    def line(passed: float, done: int) -> str:
        return f"{what}, {done} forward passes in {spoken(passed)}"

    with _told(module, line, SLOW_S, say, clock):
        yield


@contextmanager
def _told(
    module: Any,
    line: Callable[[float, int], str],
    first: float,
    say: Callable[[str], None],
    clock: Callable[[], float],
) -> Iterator[None]:
    """Say line(seconds, passes) after a pass of `module`, from `first` seconds on."""
    began, done, due = clock(), 0, first

    def count(*_: object) -> None:
        nonlocal done, due
        done += 1
        passed = clock() - began
        if passed >= due:
            due = min(2 * passed, passed + EVERY_S)
            say(line(passed, done))

    handle = module.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()


def spoken(seconds: float) -> str:
    """40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def quiet_loading_bars() -> None:
    """One bar per checkpoint that is written would break up the lines of the steps."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

"""Progress lines for a long evaluation or step, at growing intervals."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
) -> Iterator[None]:
    """Around the sampling of `responses`, `sequences` at once, of at most `tokens` each.

    Counts the model's forward passes, one for every token of a batch; so the time left is that of
    responses which all run to their limit. A sampler that does not call `model` gives the time.
    """
    total, done = -(-responses // max(sequences, 1)) * tokens, 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1

    handle = model.register_forward_hook(count)
    try:
        with told(lambda passed: evaluation_line(passed, done, total), say, FIRST_S):
            yield
    finally:
        handle.remove()


def evaluation_line(passed: float, done: int, total: int) -> str:
    """After `passed` seconds and `done` of at most `total` forward passes."""
    if not done:
        return f"evaluation: {spoken(passed)} so far"
    left = passed / done * max(total - done, 0)
    share = min(done / max(total, 1), 1.0)
    return f"evaluation: {share:.0%} of the tokens at most, at most {spoken(left)} left"


@contextmanager
def told(line: Callable[[float], str], say: Callable[[str], None], first: float) -> Iterator[None]:
    """Say line(seconds) from `first` seconds on, whatever the program waits for."""
    ended = threading.Event()

    def tell() -> None:
        began, due = time.monotonic(), first
        while not ended.wait(began + due - time.monotonic()):
            passed = time.monotonic() - began
            due = min(2 * passed, passed + EVERY_S)
            say(line(passed))

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def slow_progress(what: str, say: Callable[[str], None]) -> AbstractContextManager[None]:
    """Lines of `what` and its time, once it has taken SLOW_S seconds."""
    return told(lambda passed: f"{what}, {spoken(passed)} so far", say, SLOW_S)


def spoken(seconds: float) -> str:
    """40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def quiet_loading_bars() -> None:
    """One bar per checkpoint that is written would break up the lines of the steps."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

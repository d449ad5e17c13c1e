"""What the products of a head really execute, padding counted: the benchmarks print it.

with counting() as work:
    linear_logprob(...).logprob.sum().backward()
units = 2 * work.multiply_adds / (N * D * V)        # one dense product of the head is 2 units
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Work:
    """Multiply-adds of matrix products since the counter was opened."""

    multiply_adds: int = 0


_open: list[Work] = []  # not a context variable: autograd runs the backward in threads of its own


@contextlib.contextmanager
def counting() -> Iterator[Work]:
    """Counts the products of every head of this process, whichever thread runs them."""
    work = Work()
    _open.append(work)
    try:
        yield work
    finally:
        _open[:] = [x for x in _open if x is not work]  # equal is not same


def executed(*sizes: int) -> None:
    """One product of these sizes was launched."""
    if _open:
        total = 1
        for size in sizes:
            total *= size
        for work in _open:
            work.multiply_adds += total

"""Which questions share a bundle, and which of their responses share a draw: a pure function of
(seed, step, question). Independent of row order, process, platform and every global generator.

The one definition that the op and the reference both use: a random order has no formula to check.
"""

from __future__ import annotations

import hashlib
import struct


def _keys(purpose: str, seed: int, step: int, question: str, count: int) -> tuple[int, ...]:
    # An extendable hash, one call per question: Python's own hash differs between processes.
    text = f"riskpo/{purpose}/{seed}/{step}/{question}".encode(errors="surrogatepass")
    return struct.unpack(f">{count}Q", hashlib.shake_128(text).digest(8 * count))


def question_order(questions: list[str], *, seed: int, step: int) -> list[str]:
    """A random order of distinct questions that does not depend on the order they came in."""
    return sorted(questions, key=lambda q: (_keys("order", seed, step, q, 1), q))


def draw_permutation(question: str, draws: int, *, seed: int, step: int) -> list[int]:
    """xi of one question: a uniform permutation of 0..draws-1; xi[j] is its response in draw j."""
    keys = _keys("draws", seed, step, question, draws)
    return sorted(range(draws), key=lambda j: (keys[j], j))


def sampling_seed(question: str, *, seed: int, step: int) -> int:
    """A seed in [0, 2^63) of one question's own random numbers in one step."""
    return _keys("sampling", seed, step, question, 1)[0] >> 1

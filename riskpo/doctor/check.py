"""What a check found, as a line of the terminal and as a cell of the report's matrices."""

from __future__ import annotations

from typing import NamedTuple


class Check(NamedTuple):
    """ok None: not checked, and the text says why. An empty text: `ok` is all there is to say."""

    ok: bool | None
    text: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        word = {True: "ok     ", False: "FAILED ", None: "skipped"}[self.ok]
        return f"{word} {self.text}" + (f"\n        -> {self.remedy}" if self.remedy else "")

    @property
    def cell(self) -> str:
        """Numbers as they are, an identity as yes or no, failures in bold."""
        text = self.text or ("yes" if self.ok else "no")
        return f"**{text}**" if self.ok is False else text


def bounded(error: float, limit: float, unit: str = "") -> Check:
    """`error <= limit`, written out; NaN does not hold."""
    holds = error <= limit
    return Check(holds, f"{error:.1e} {'≤' if holds else '>'} {limit:.1e}{unit}")


def first_line(error: Exception, most: int = 60) -> str:
    """The first `most` letters of an error's first line, after its type."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:most]}"

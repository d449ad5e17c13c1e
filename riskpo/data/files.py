"""Rows of a local file or of a hub data set. questions.py says what they mean."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from riskpo.data.hub import HUB_SECONDS, hub_error
from riskpo.data.values import Row, refuse

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
OTHER_SUFFIXES = (".txt", ".tsv", ".xlsx", ".xls", ".arrow", ".zip", ".zst", ".bz2", ".xz", ".pkl")


def is_file(source: str) -> bool:
    """Whether a source is meant to be a local file; a folder or another name is the hub's."""
    path = Path(source).expanduser()
    return path.is_file() or _format(path) in (*FILE_SUFFIXES, *OTHER_SUFFIXES)


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if suffixes[-1:] == [".gz"] and suffixes[1:] else "".join(suffixes[-1:])


def read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of a file, one by one; place is "line 7" or "row 7", from 1, for errors.

    ValueError, with the place, for whatever cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"load_questions: there is no file {path}. Check the path.")
    kind = _format(path)
    if kind not in FILE_SUFFIXES:
        ends = f"a file that ends in {', '.join(FILE_SUFFIXES)}, with or without .gz"
        raise refuse(str(path), ends, "Convert it or name it by what it holds.")
    reader = {".jsonl": _lines, ".json": _whole, ".csv": _table, ".parquet": _parquet}[kind]
    place = ["its beginning"]
    try:
        for place[0], row in reader(path):
            yield place[0], row
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise ValueError(
            f"load_questions: {path} cannot be read after {place[0]}: {type(error).__name__}: "
            f"{error}. Check the file: text has to be UTF-8."
        ) from None


def _opened(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", _json(line, f"{path} line {number}", "")


def _json(text: str, where: str, todo: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"load_questions: {where} is not JSON ({error}): {text.strip()[:60]!r}; expected "
            f"{todo or 'one whole object on each line'}. Mend it."
        ) from None


def _whole(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        rows = _json(file.read(), str(path), "one list of rows (for one row a line: .jsonl)")
    if not isinstance(rows, list):
        raise ValueError(
            f"load_questions: {path} holds a {type(rows).__name__}; expected a list of rows. "
            "Write one row per line into a .jsonl file."
        )
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    """CSV with a header; every value is text, and nothing where a line is too short."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _opened(path) as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            place = f"line {reader.line_num}"
            if None in row:
                raise ValueError(
                    f"load_questions: {path} {place} has more fields than the header's "
                    f"{len(reader.fieldnames or ())}; expected as many. Put text with commas "
                    "between quotes."
                )
            yield place, row


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        if path.suffix.lower() == ".gz":
            raise ValueError("it is compressed with gzip on top; unpack it")
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, ValueError) as error:
        raise ValueError(
            f"load_questions: {path} cannot be read as parquet after row {number}: {error}. Check "
            "the file."
        ) from None


def read_hub(source: str, split: str) -> Iterable[Row]:
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    offline = constants.HF_HUB_OFFLINE
    if not Path(source).exists() and not offline:
        if error := hub_error(lambda: get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)):
            raise ConnectionError(
                f"load_questions: the hub ({constants.ENDPOINT}) did not answer ({error}), so "
                f"{source!r} cannot be loaded. Give a local .jsonl or .parquet file, or set "
                "HF_HUB_OFFLINE=1 to use a copy from the cache."
            )
    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        kind = ConnectionError if offline or isinstance(error, ConnectionError) else ValueError
        raise kind(
            f"load_questions: cannot load {source!r}, split {split!r}"
            f"{' (HF_HUB_OFFLINE is set)' if offline else ''}: {reason}. Check the name, or give a "
            "local .jsonl or .parquet file."
        ) from None  # one line; the reason is in it

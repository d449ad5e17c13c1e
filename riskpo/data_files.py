"""Rows of a local file or of a hub data set; what they mean is riskpo/data.py's affair."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
HUB_SECONDS = 3.0

Row = dict[str, Any]
_log = logging.getLogger(__name__)


def read_file(path: Path) -> list[Row]:
    if not path.is_file():
        raise ValueError(f"load_questions: there is no file {path}. Check the path.")
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.read_table(path).to_pylist())
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() == ".json":
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise ValueError(
                f"load_questions: {path} holds a {type(rows).__name__}; expected a list of rows. "
                "Write one row per line into a .jsonl file."
            )
        return rows
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def read_hub(source: str, split: str) -> Iterable[Row]:
    import datasets
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    if not Path(source).exists() and not offline and not _hub_answers():
        raise ConnectionError(
            f"load_questions: the hub ({constants.ENDPOINT}) did not answer within "
            f"{HUB_SECONDS:.0f} s, so {source!r} cannot be loaded. Give a local .jsonl or .parquet "
            "file, or set HF_HUB_OFFLINE=1 to use a copy from the cache."
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


def _hub_answers() -> bool:
    """One request with a short limit, proxies respected; the libraries retry for 23 s and more."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answered, done = threading.Event(), threading.Event()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
            answered.set()
        except Exception as error:  # any reason means the same: no hub
            _log.debug("hub: %s", error)
        finally:
            done.set()

    threading.Thread(
        target=ask, daemon=True
    ).start()  # name resolution has no time limit of its own
    done.wait(HUB_SECONDS)
    return answered.is_set()

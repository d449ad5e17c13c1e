"""The versions of a host that were tested; outside them an adapter refuses to load."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def check_window(package: str, lowest: str, below: str) -> None:
    """ImportError unless lowest <= installed version of `package` < below.

    The adapters use parts of their hosts that are not public and may change between minor
    versions; a silent change of meaning would cost a training run.
    """
    remedy = f"pip install '{package}>={lowest},<{below}'"
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(
            f"riskpo.integrations: {package} is not installed. Run: {remedy}"
        ) from None
    if not _release(lowest) <= _release(found) < _release(below):
        raise ImportError(
            f"riskpo.integrations: got {package} {found}; expected a tested version, "
            f">={lowest},<{below}. "
            f"Run: {remedy}"
        )


def _release(text: str) -> tuple[int, ...]:
    """1.16.0rc1 and 1.16.0.dev0 as (1, 16, 0)."""
    parts = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)

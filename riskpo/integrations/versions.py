"""The versions of a host that were tested; outside them an adapter refuses to load."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


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
    low, now, end = (Version(text).release for text in (lowest, found, below))
    if not low <= now < end:
        raise ImportError(
            f"riskpo.integrations: got {package} {found}; expected a tested version, "
            f">={lowest},<{below}. "
            f"Run: {remedy}"
        )

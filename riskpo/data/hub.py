"""Whether the hub answers, known within seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable

HUB_SECONDS = 3.0


def hub_error(ask: Callable[[], object]) -> str | None:
    """Why a request to the hub failed, or that HUB_SECONDS are over; None where it was answered.

    The libraries retry for 23 s and more, and name resolution has no time limit of its own: the
    request runs in a thread that nobody waits for.
    """
    errors: list[str | None] = []

    def run() -> None:
        try:
            ask()
            errors.append(None)
        except Exception as error:  # whatever the client library raises
            reason = str(error).strip().partition("\n")[0]
            errors.append(f"{type(error).__name__}: {reason[:200]}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return errors[0] if errors else f"no answer within {HUB_SECONDS:.0f} s"

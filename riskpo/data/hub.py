"""Find out within seconds whether the Hugging Face hub answers."""

from __future__ import annotations

import threading
from collections.abc import Callable

HUB_SECONDS = 3.0


def hub_error(ask: Callable[[], object]) -> str | None:
    """Why the request `ask` failed or took over HUB_SECONDS; None if it was answered.

    It runs in a thread that may outlive the call: the libraries retry for 23 s and more, and name
    resolution has no time limit.
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

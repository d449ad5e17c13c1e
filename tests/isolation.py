"""Whether programs can be isolated on this machine; tests that need it skip, or fail, without.

RISKPO_REQUIRE_SANDBOX=1, as continuous integration has it, makes them fail: skipped wholesale, they
would leave the sandbox untested with nobody told.
"""

import os

import pytest

from riskpo.rewards.sandbox.run import SandboxUnavailable, require

VARIABLE = "RISKPO_REQUIRE_SANDBOX"

try:
    require()
    CLOSED = ""
except SandboxUnavailable as error:
    CLOSED = str(error)

needs_sandbox = pytest.mark.usefixtures("isolation")


def skip_or_fail(closed: str) -> None:
    """Skip the running test for the reason `closed`, if any; fail it where VARIABLE is set."""
    if not closed:
        return
    if os.environ.get(VARIABLE, "0") not in ("", "0"):
        pytest.fail(f"{VARIABLE} is set, but: {closed}", pytrace=False)
    pytest.skip(closed)

"""Moved to riskpo.integrations.prime_rl."""

from riskpo.hosts import moved

moved(__name__, "riskpo.integrations.prime_rl")

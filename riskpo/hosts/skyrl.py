"""Moved to riskpo.integrations.skyrl."""

from riskpo.hosts import moved

moved(__name__, "riskpo.integrations.skyrl")

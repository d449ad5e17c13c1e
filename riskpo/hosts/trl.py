"""Moved to riskpo.integrations.trl."""

from riskpo.hosts import moved

moved(__name__, "riskpo.integrations.trl")

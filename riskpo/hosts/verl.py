"""Moved to riskpo.integrations.verl."""

from riskpo.hosts import moved

moved(__name__, "riskpo.integrations.verl")

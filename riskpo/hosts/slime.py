"""Moved to riskpo.integrations.slime."""

from riskpo.hosts import moved

moved(__name__, "riskpo.integrations.slime")

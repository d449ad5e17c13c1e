"""Moved to riskpo.integrations.verl.reward."""

from riskpo.hosts import moved

moved(__name__, "riskpo.integrations.verl.reward")

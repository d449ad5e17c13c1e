"""`python -m riskpo.integrations.verl`: what is registered, once the import has checked it."""

from riskpo.integrations.verl import banner

print(banner(), flush=True)

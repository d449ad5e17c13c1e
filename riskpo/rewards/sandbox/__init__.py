"""A process for programs nobody trusts."""

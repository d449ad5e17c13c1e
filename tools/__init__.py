"""Checks that need no GPU and are no tests of behaviour."""

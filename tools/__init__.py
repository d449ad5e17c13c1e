"""Checks, measurements and generated pages that are not part of the tests."""

"""docs/api.md says what the docstrings say."""

from __future__ import annotations

import pytest

import riskpo_kernels
from riskpo_kernels import causal_lm
from tools import api_page


def test_the_page_is_what_the_docstrings_say():
    shown = api_page.PAGE.read_text(encoding="utf-8")
    assert shown == api_page.page(), "docs/api.md is old: python -m tools.api_page"
    for name in (*riskpo_kernels.__all__, *causal_lm.__all__):
        assert f"#### {name}\n" in shown
    assert 'outside_support: "raise" for a target' in shown, "arguments are searched here"


def test_a_name_without_a_docstring_is_an_error():
    def nameless(x): ...

    with pytest.raises(ValueError, match="nameless has no docstring"):
        api_page.entry("nameless", nameless)

"""Every causal language model that transformers can name, tried with the trainer."""

from __future__ import annotations

import pytest
import torch

from tests.model_families import NOT_TINY, VOCAB, build, families


@pytest.mark.parametrize("family", [name for name in families() if name not in NOT_TINY])
def test_every_family_is_built_tiny(family):
    """A family that transformers adds and that this cannot build fails here by its name."""
    model = build(family)
    assert sum(p.numel() for p in model.parameters()) < 3e6
    with torch.no_grad():
        logits = model(input_ids=torch.arange(9)[None] * 7 % VOCAB, use_cache=False).logits
    assert logits.isfinite().all() and logits.std() > 1e-3


def test_what_is_left_out_exists():
    assert NOT_TINY.keys() <= set(families())

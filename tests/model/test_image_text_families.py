"""Image-text models of transformers on rows of text alone: right, or refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from riskpo.model.isolation import settle_attention
from riskpo_kernels.causal_lm import find_head
from tests.model.test_head import check_log_probs
from tests.model.test_model_families import both, value_gap
from tests.model_families import CHANGES, SIZES, merge, redraw, shrunk

LARGEST = 3e7  # parameters; a family whose names do not tell how to make it small is left out
OWN = {
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"]}},
    # read by the model's forward wherever a row is padded, and in no default of its config
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 4},
}


def build_tiny(family):
    """The model, float32 in eval mode; a skip where transformers cannot build it tiny."""
    try:
        kind = CONFIG_MAPPING[family]
        given = shrunk(kind(), SIZES)
        merge(given, CHANGES.get(family, OWN.get(family, {})))
        config = kind(**given)
        with torch.device("meta"):
            size = sum(
                p.numel() for p in AutoModelForImageTextToText.from_config(config).parameters()
            )
        if size > LARGEST:
            pytest.skip(f"{size:.0e} parameters")
        model = AutoModelForImageTextToText.from_config(config)
    except Exception as error:  # whatever a family's code raises on sizes it did not expect
        pytest.skip(f"cannot be built tiny: {type(error).__name__}: {error}"[:120])
    redraw(model, 0)
    return model.eval()


@pytest.mark.parametrize("family", sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
def test_rows_of_text_are_right_or_refused(family):
    model = build_tiny(family)
    try:
        packing = settle_attention(model, "auto")
    except ValueError as refused:
        assert type(model).__name__ in str(refused)
        return
    assert value_gap(*both(model, packing)) < 1e-5
    if family == "lfm2_vl":
        assert packing.reason is not None
    try:
        find_head(model)
    except ValueError as refused:
        assert str(refused).startswith("head: ") and type(model).__name__ in str(refused)
        return
    check_log_probs(model)

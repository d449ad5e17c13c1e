"""Qwen2-VL: pictures of any size, positions in three dimensions, token types beside the tokens.

Its processor asks for torchvision, which is not a dependency; here it gets pictures through PIL and
no videos, and is handed to the trainer instead of being loaded.
"""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from riskpo.model.load import load_policy_for
from riskpo.model.vision import question_inputs
from riskpo.train import train
from tests.pictures import PAIR, RED, draw, png, recomputed, settings

MARKS = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz .?0123456789+=:\n\\{}"
WORDS = ["<pad>", "<eos>", "<unk>", *MARKS, *LETTERS]
TEMPLATE = """{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\
{% endfor %}:"""


class WithoutVideos(Qwen2VLProcessor):
    """The real processor, but it does not look up the video processor's class (torchvision)."""

    def check_argument_for_proper_class(self, name, value):
        return None


def make_processor():
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=MARKS,
    )
    pictures = Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, min_pixels=28 * 28, max_pixels=56 * 56
    )
    return WithoutVideos(pictures, tokenizer, chat_template=TEMPLATE)


def save_model(folder):
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    ends = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    ids = {f"{name}_id": WORDS.index(f"<|{mark}|>") for name, mark in NAMES.items()}
    text = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    untied = {"tie_word_embeddings": False}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={**text, **size, **ends, **untied, "rope_parameters": rope},
            vision_config={**vision, "mlp_ratio": 2},
            **ids,
            **untied,
        )
    )
    with torch.no_grad():  # sharp enough for log-probs and pictures to differ
        model.lm_head.weight.mul_(20)
        model.model.visual.merger.mlp[2].weight.mul_(50)
    model.generation_config.update(**ends)
    model.save_pretrained(folder)
    return folder


NAMES = {
    "image_token": "image_pad",
    "video_token": "video_pad",
    "vision_start_token": "vision_start",
    "vision_end_token": "vision_end",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("qwen2-vl"))


@pytest.fixture(autouse=True)
def handed_over(monkeypatch):
    monkeypatch.setattr("riskpo.model.load.load_processor", lambda name, local: make_processor())


@pytest.fixture
def policy(folder):
    return load_policy_for([RED], str(folder), dtype="float32")


def test_the_trainer_computes_the_samplers_log_probs(policy):
    rollouts = draw(policy, [RED, PAIR])
    patches = [int((tokens == WORDS.index("<|image_pad|>")).sum()) for tokens in rollouts.tokens]
    grids = [rollouts.inputs[q.id]["image_grid_thw"] for q in (RED, PAIR)]
    assert patches == [int(g.prod(1).sum()) // 4 for g in grids for _ in range(3)]
    for ours, theirs in zip(recomputed(policy, rollouts), rollouts.logprob, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_another_picture_changes_the_log_probs(policy):
    rollouts = draw(policy, [RED])
    before = recomputed(policy, rollouts)
    blue = question_inputs(policy.processor, replace(RED, images=(png("blue"),)))
    rollouts.inputs["red"] = blue[1]
    for ours, theirs in zip(recomputed(policy, rollouts), before, strict=True):
        assert float((ours - theirs).abs().max()) > 1e-2


def test_responses_do_not_depend_on_how_the_batch_is_cut(policy):
    whole, cut = draw(policy, [RED, PAIR]), draw(policy, [PAIR, RED], batch_sequences=2)
    assert whole.text == cut.text[3:] + cut.text[:3]


def test_a_step_trains_the_vision_tower(folder, tmp_path, policy, monkeypatch):
    monkeypatch.setattr(
        "riskpo.train.write_report", lambda run_dir: run_dir
    )  # slow, and tested elsewhere
    config = settings(folder, tmp_path, entropy_coef=1.0)
    monkeypatch.setattr(WithoutVideos, "save_pretrained", lambda self, path, **_: None)
    train(config)
    trained = Qwen2VLForConditionalGeneration.from_pretrained(
        tmp_path / "run" / "checkpoints" / "step_000001"
    )
    name = "model.visual.patch_embed.proj.weight"
    assert not torch.equal(trained.state_dict()[name], policy.model.state_dict()[name])

"""Rows with pictures train and evaluate end to end on a tiny random vision-language model."""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from riskpo.config import LoraConfig, MemoryConfig
from riskpo.eval import evaluate_model
from riskpo.eval_config import EvalConfig
from riskpo.model.load import load_policy_for
from riskpo.model.packing import hidden_states, pack
from riskpo.model.vision import check_vision_head, question_inputs
from riskpo.train import train
from riskpo.trainer.checkpoint import latest_checkpoint
from riskpo.types import Rollouts
from riskpo_kernels.causal_lm import Head, find_head
from tests.pictures import PAIR, RED, draw, png, recomputed, settings
from tests.toy import save_byte_model

WORDS = ["<pad>", "<eos>", "<image>", "<unk>", *"abcdefghijklmnopqrstuvwxyz .?0123456789+=:\n\\{}"]
TEMPLATE = """{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}\
<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}:"""


def save_vision_model(folder):
    """LLaVA in small: a CLIP tower of 4 patches, a Qwen2 of 2 layers, a tokenizer of characters."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    side = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    size = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, image_size=28, patch_size=14, **size
    )
    ends = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    text = Qwen2Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        **size,
        **ends,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=2, vision_feature_layer=-1
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # sharp enough for log-probs and pictures to differ
        model.lm_head.weight.mul_(20)
        model.model.multi_modal_projector.linear_2.weight.mul_(50)
    model.generation_config.update(**ends)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_vision_model(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy_for([RED], str(folder), dtype="float32")


def test_the_trainer_computes_the_samplers_log_probs(policy):
    rollouts = draw(policy, [RED, PAIR])
    assert rollouts.prompt_len[0] == 4 + len("find x.:")
    assert (rollouts.tokens[3][: rollouts.prompt_len[3]] == 2).sum() == 8  # 4 patches a picture
    for ours, theirs in zip(recomputed(policy, rollouts), rollouts.logprob, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_another_picture_changes_the_log_probs(policy):
    rollouts = draw(policy, [RED])
    before = recomputed(policy, rollouts)
    blue = question_inputs(policy.processor, replace(RED, images=(png("blue"),)))
    assert blue[0] == rollouts.tokens[0][: rollouts.prompt_len[0]].tolist()
    rollouts.inputs["red"] = blue[1]
    for ours, theirs in zip(recomputed(policy, rollouts), before, strict=True):
        assert float((ours - theirs).abs().max()) > 1e-2


def test_gradients_reach_the_vision_tower(policy):
    rollouts = draw(policy, [RED], responses_per_question=1)
    batch = pack(rollouts, [0], policy.device)
    hidden_states(policy.model, batch).square().sum().backward()
    weight = policy.model.model.vision_tower.embeddings.patch_embedding.weight
    assert float(weight.grad.abs().max()) > 0
    policy.model.zero_grad()


def test_responses_do_not_depend_on_how_the_batch_is_cut(policy):
    whole, cut = draw(policy, [RED, PAIR]), draw(policy, [PAIR, RED], batch_sequences=2)
    assert whole.text == cut.text[3:] + cut.text[:3]


def test_kept_rows_bring_their_pictures(policy):
    rollouts, kept = draw(policy, [RED, PAIR]), Rollouts()
    kept.extend(rollouts, [3, 4])
    assert set(kept.inputs) == {"pair"}


def test_a_response_ends_with_a_placeholder(policy):
    """As an input of the update the model would look for a picture's features there."""
    weight = policy.model.lm_head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(0.05)  # nearly uniform: a third of 32 responses meet the placeholder
        rollouts = draw(policy, [RED], responses_per_question=32)
        ours = recomputed(policy, rollouts)
        weight.copy_(kept)
    responses = [t[n:].tolist() for t, n in zip(rollouts.tokens, rollouts.prompt_len, strict=True)]
    assert any(2 in r for r in responses) and all(2 not in r[:-1] for r in responses)
    assert all(x.isfinite().all() for x in ours)


def test_a_head_that_is_not_the_models_is_refused(policy):
    head = find_head(policy.model)
    check_vision_head(policy, head, [RED])
    wrong = Head(torch.nn.Linear(32, len(WORDS), bias=False), head.options)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration differ from"):
        check_vision_head(policy, wrong, [RED])


def test_train_resume_and_eval(folder, tmp_path, policy, monkeypatch):
    monkeypatch.setattr(
        "riskpo.train.write_report", lambda run_dir: run_dir
    )  # slow, and tested elsewhere
    config = settings(folder, tmp_path, entropy_coef=1.0)
    train(config)
    train(replace(config, steps=2))
    saved = latest_checkpoint(config.run_dir)
    trained = load_policy_for([RED], str(saved), dtype="float32")
    name = "model.vision_tower.embeddings.patch_embedding.weight"
    assert saved.name == "step_000002"
    assert not torch.equal(trained.model.state_dict()[name], policy.model.state_dict()[name])
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    apart = [line["sampler_kl"] for line in lines if "sampler_kl" in line]
    assert len(apart) == 2 and max(map(abs, apart)) < 1e-6
    (result,) = evaluate_model(
        EvalConfig(
            model=config.run_dir,
            data=config.data,
            reward="exact",
            questions=3,
            samples=2,
            ks=(1,),
            max_response_tokens=4,
        )
    )
    assert result.questions == 3


def test_doors(folder, tmp_path):
    text = save_byte_model(tmp_path / "text")
    with pytest.raises(ValueError, match="pictures.*has no image processor"):
        train(settings(text, tmp_path))
    data = str(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="pictures.*has no image processor"):
        evaluate_model(EvalConfig(model=str(text), data=data, questions=3))
    with pytest.raises(ValueError, match="pictures do not train with lora.rank > 0"):
        train(settings(folder, tmp_path, lora=LoraConfig(rank=2)))
    with pytest.raises(ValueError, match="vision tower is not causal"):
        train(settings(folder, tmp_path, memory=MemoryConfig(attention="sequences")))

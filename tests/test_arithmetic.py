"""The tasks that can be asked for: their strata, their warm start, their names."""

import hashlib
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from riskpo.config import TrainConfig, resolve, validate
from riskpo.demo import (
    TASKS,
    build_model,
    build_questions,
    build_tokenizer,
    find_task,
    task_questions,
    warm_start,
)
from riskpo.run import load_data, warmed_up


def test_the_mixed_task_has_four_strata_of_the_stated_sizes():
    task = find_task("embedded:mixed")
    questions = task_questions(task, 0)
    assert len(questions) == task.questions == len({q.id for q in questions})
    assert set(Counter(q.meta["stratum"] for q in questions)) == set(task.warm_share)
    for q in questions:
        a, b = q.prompt.rstrip("=").split("+")
        assert len(a) == len(b) == 4 and int(q.gold[::-1]) == int(a) + int(b)
        size_a, size_b = map(int, q.meta["stratum"].split("+"))
        assert int(a) < 10**size_a and int(b) < 10**size_b
    assert sum(task.warm_share.values()) == pytest.approx(1.0)


def test_the_demo_asks_what_it_always_asked():
    questions, held_out = load_data(TrainConfig(eval_questions=200))
    everything = {q.id: q for q in build_questions(6000, 0)}
    assert len(held_out) == 200 and {q.id for q in questions + held_out} == set(everything)
    assert TASKS["embedded"].warm_share is None and TASKS["embedded"].warm_target == 0.4


def model_before_sizes_could_be_asked_for(seed):
    """The model of all earlier runs, written out."""
    config = Qwen2Config(
        vocab_size=14,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config)


@pytest.mark.parametrize("name", ["embedded", "embedded:mixed"])
def test_the_models_of_earlier_runs_keep_every_bit(name):
    earlier = model_before_sizes_could_be_asked_for(3)
    torch.manual_seed(8)
    before = torch.get_rng_state()
    model = build_model(build_tokenizer(), 3, TASKS[name].model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.config.to_dict() == earlier.config.to_dict()  # heads leave no trace in weights
    found, expected = model.state_dict(), earlier.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert TASKS[name].warm_learning_rate == 1e-3


def sha256(parts):
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch's normal numbers differ in their last bits where there is no AVX2",
)
def test_the_demos_weights_have_their_old_hash():
    """Hash of names and bytes, taken when the size was still written into build_model."""
    weights = sorted(build_model(build_tokenizer(), 0).state_dict().items())
    parts = (x for name, value in weights for x in (name.encode(), value.numpy().tobytes()))
    assert sha256(parts) == "c9318d44a8c4df67751d9254229e9deb08794264032aa39032b82f86277af319"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embedded", "1bb7c5762bfacf206b4560a28b593a5c9f6c6e207a71ea49af34f07ce5d173b1"),
        ("embedded:mixed", "5969f03173ce15efaff19413c03f412342a5ca13b698430892bed0843c4d8f34"),
    ],
)
def test_the_questions_have_their_old_hash(name, expected):
    questions = task_questions(find_task(name), 0)
    lines = "\n".join(f"{q.id} {q.gold} {q.meta['stratum']}" for q in questions)
    assert sha256([lines.encode()]) == expected


def test_the_large_task_is_larger_and_fits_the_embedded_defaults():
    task, tokenizer = find_task("embedded:large"), build_tokenizer()
    with torch.device("meta"):
        model = build_model(tokenizer, 0, task.model)
    # per layer: 4 attention products, 3 of the MLP (twice as wide), 3 biases, 2 norms
    layer = 4 * 512**2 + 3 * 512 * 1024 + 3 * 512 + 2 * 512
    assert sum(p.numel() for p in model.parameters()) == 8 * layer + 2 * 14 * 512 + 512
    questions = task_questions(task, 0)
    assert len(questions) == task.questions == len({q.id for q in questions})
    strata = Counter(q.meta["stratum"] for q in questions)
    assert set(strata) == set(task.warm_share) and sum(task.warm_share.values()) == 1
    config = resolve(TrainConfig(data="embedded:large"))[0]
    for q in questions[:200]:
        assert len(tokenizer(q.prompt)["input_ids"]) <= config.max_prompt_tokens
        assert len(tokenizer(q.gold)["input_ids"]) + 1 <= config.max_response_tokens


def test_a_size_is_what_was_asked_for():
    model = build_model(build_tokenizer(), 0, (48, 3, 2))
    config = model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (48, 96, 3)
    assert config.num_attention_heads == config.num_key_value_heads == 2


def test_the_tiny_task_warms_up_in_a_few_steps():
    """What rehearsals rely on: a real warm start that ends at its target within seconds."""
    said = []
    config = resolve(TrainConfig(data="embedded:tiny", eval_questions=10))[0]
    policy = warmed_up(config, load_data(config)[0], said.append)
    assert policy.model.config.hidden_size == 32
    steps, reached = re.fullmatch(r"warm start: (\d+) steps, (\d+)% of .*", said[-1]).groups()
    assert int(steps) < 500 and int(reached) >= 5


def test_the_warm_start_shows_each_stratum_its_share(monkeypatch):
    shown = Counter()
    import riskpo.demo

    supervised = riskpo.demo._supervised_batch

    def count(tokenizer, questions):
        shown.update(q.meta["stratum"] for q in questions)
        return supervised(tokenizer, questions)

    monkeypatch.setattr(riskpo.demo, "_supervised_batch", count)
    task, tokenizer = find_task("embedded:mixed"), build_tokenizer()
    model, questions = build_model(tokenizer, 0), task_questions(replace(task, questions=400), 0)
    warm_start(model, tokenizer, questions, task, lambda: 1.0, seed=0, check_every=40)
    total = sum(shown.values())
    assert total == 40 * 64
    for stratum, share in task.warm_share.items():
        assert shown[stratum] / total == pytest.approx(share, abs=0.03)


def test_names():
    with pytest.raises(ValueError, match="expected one of embedded, embedded:mixed"):
        find_task("embedded:hard")
    mixed = TrainConfig(data="embedded:mixed")
    config, overrides = resolve(mixed)
    validate(config)
    assert not overrides and config.learning_rate == 3e-4 and config.max_response_tokens == 8
    assert resolve(TrainConfig())[1] == {"baseline": "leave-one-out"}  # the demo, and it alone
    validate(resolve(replace(mixed, model="somewhere"))[0])
    with pytest.raises(ValueError, match="model=None"):
        validate(resolve(TrainConfig(data="sums.jsonl"))[0])
    with pytest.raises(ValueError, match="data=None"):
        validate(resolve(TrainConfig(model="somewhere"))[0])


def test_a_16_bit_start_rounds_weights_alone(monkeypatch):
    """Rotary frequencies stay float32, as when the checkpoint is loaded again."""
    monkeypatch.setattr("riskpo.run.warm_start", lambda *a, **k: (0, 0.0))
    policy = warmed_up(
        resolve(TrainConfig(data="embedded:tiny", dtype="bfloat16"))[0], [], lambda line: None
    )
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    buffers = dict(policy.model.named_buffers())
    assert buffers and all(b.dtype == torch.float32 for b in buffers.values())

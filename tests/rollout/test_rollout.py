"""Sampling: the sampler's log-probs are the trainer's, and nothing bends the distribution."""

from __future__ import annotations

import json
import time

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GenerationConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoConfig,
    OPTConfig,
    Qwen2Config,
    RobertaConfig,
)

from riskpo.config import RunConfig, TrainConfig
from riskpo.model.load import Policy, end_tokens, load_policy, prepare
from riskpo.model.positions import position_limit
from riskpo.rollout import generate
from riskpo.rollout.generate import response_noise
from riskpo.rollout.sampler import prompt_tokens
from riskpo.train import train
from riskpo.trainer.parallel import ParallelModel
from riskpo.trainer.update import recompute
from riskpo.types import Question
from riskpo_kernels.causal_lm import find_head
from tests.model_families import build
from tests.toy import sample, save_arithmetic, save_byte_model, tiny_policy

# Prompts of different lengths, so that there is padding on the left.
QUESTIONS = [Question(p, p, "") for p in ("1+2=", "012+345=", "9=", "77+88=")]
LIMITS = {"max_prompt_tokens": 20, "max_response_tokens": 6, "stream": (0, 1)}


def draw(policy, **changes):
    return sample(policy, QUESTIONS, responses_per_question=5, **LIMITS | changes)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_trainer_agree(temperature):
    policy = tiny_policy()
    rollouts = draw(policy, temperature=temperature)
    plan = RunConfig(temperature=temperature)
    rows, head = list(range(len(rollouts))), find_head(policy.model)
    trainer = recompute(ParallelModel(policy.model), head, rollouts, [rows[:7], rows[7:]], plan)
    for row in rows:
        theirs = trainer[row][rollouts.prompt_len[row] - 1 :]
        torch.testing.assert_close(rollouts.logprob[row], theirs, rtol=0, atol=2e-5)


def test_temperature_0_takes_the_likeliest_token():
    policy = tiny_policy()
    rollouts = draw(policy, temperature=0.0)
    for tokens, start in zip(rollouts.tokens[::5], rollouts.prompt_len[::5], strict=True):
        with torch.no_grad():
            likeliest = policy.model(tokens[None]).logits[0].argmax(-1)
        assert torch.equal(tokens[start:], likeliest[start - 1 : -1])


def test_rows_are_question_major_and_end_at_the_end_token():
    policy = tiny_policy()
    rollouts = draw(policy, max_response_tokens=30)
    assert rollouts.question_id == [q.id for q in QUESTIONS for _ in range(5)]
    assert any(rollouts.truncated) != all(rollouts.truncated)  # both kinds occur
    for tokens, prompt, logprob, cut in zip(
        rollouts.tokens, rollouts.prompt_len, rollouts.logprob, rollouts.truncated, strict=True
    ):
        response = tokens[prompt:].tolist()
        assert len(response) == len(logprob) and (logprob <= 0).all()
        assert (response.count(1), cut) in ((0, True), (1, False))
        assert cut or response[-1] == 1
    for row, text in enumerate(rollouts.text):
        assert text == policy.tokenizer.decode(
            rollouts.tokens[row][rollouts.prompt_len[row] :], skip_special_tokens=True
        )


def test_random_numbers_are_a_function_of_stream_and_question():
    policy = tiny_policy()
    first = draw(policy)
    assert first.text == draw(policy).text
    torch.manual_seed(7)  # torch's own generator has no say
    assert first.text == draw(policy).text
    assert first.text != draw(policy, stream=(0, 2)).text
    alone = sample(policy, QUESTIONS[2:3], responses_per_question=5, **LIMITS)
    assert alone.text == first.text[10:15] and len(set(alone.text)) > 1


def test_the_random_numbers_are_those_of_every_version():
    """A run that is resumed, or repeated from its seed, draws what it drew."""
    numbers = response_noise((0, 1, 2), Question("q7", "", ""), 2, 3)
    golden = [[0.6093438670766873, 0.5308055752603865, 0.348631998200692]]
    golden += [[0.6040411082926807, 0.9555642667966223, 0.5547488775942304]]
    assert numbers.tolist() == golden


@pytest.mark.parametrize("changes", [{"batch_sequences": 3}, {"static_cache": True}])
def test_batches_and_caches_do_not_change_what_is_sampled(changes):
    policy = tiny_policy()
    whole, other = draw(policy), draw(policy, **changes)
    assert whole.text == other.text
    for ours, theirs in zip(whole.logprob, other.logprob, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_a_prompt_is_read_once_for_all_its_responses(monkeypatch):
    """Its last token aside; with other prompts beside it."""
    policy, read = tiny_policy(), []
    draw(policy)  # the model is tried on its first prompts
    hook = policy.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, given: read.append(tuple(given[0].shape))
    )
    shared = draw(policy)
    hook.remove()
    longest = max(len(prompt_tokens(policy.tokenizer, q.prompt)) for q in QUESTIONS)
    assert read[:3] == [(4, longest - 1), (20, 1), (20, 1)]
    monkeypatch.setattr(generate, "prompt_cache", lambda *given: None)
    alone = draw(policy)
    assert shared.text == alone.text
    for ours, theirs in zip(shared.logprob, alone.logprob, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "family, once",
    [
        ("gpt2", True),  # learned positions
        ("bloom", True),  # a bias by distance
        ("gemma3_text", True),  # a sliding window
        ("moshi", False),  # loses its place after a cache
        ("openai-gpt", False),  # takes no cache
        ("mamba", False),  # keeps a state
    ],
)
def test_families_read_a_prompt_once_or_as_before(family, once, monkeypatch):
    policy, found = Policy(build(family), tiny_policy().tokenizer), []
    real = generate.prompt_cache
    monkeypatch.setattr(generate, "prompt_cache", lambda *a: found.append(real(*a)) or found[-1])
    shared = draw(policy)
    assert [cache is not None for cache in found] == [once]
    monkeypatch.setattr(generate, "prompt_cache", lambda *given: None)
    alone = draw(policy)
    assert shared.text == alone.text
    for ours, theirs in zip(shared.logprob, alone.logprob, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_the_models_own_sampling_settings_are_dropped():
    policy = tiny_policy()
    policy.model.generation_config = GenerationConfig(
        top_k=1, top_p=0.1, repetition_penalty=5.0, eos_token_id=[1, 3], temperature=0.1
    )
    prepare(policy)
    assert policy.model.generation_config.eos_token_id == [1, 3]
    assert policy.model.generation_config.repetition_penalty in (None, 1.0)
    assert len(set(draw(policy).text)) > 5  # top_k=1 would repeat itself


LEAKS = {
    "top_p": 0.1, "top_k": 1, "min_p": 0.9, "typical_p": 0.1, "temperature": 0.01,
    "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(2, 12)),
    "begin_suppress_tokens": list(range(2, 12)), "bad_words_ids": [[2], [3]],
    "forced_bos_token_id": 5, "forced_eos_token_id": 7, "max_length": 3, "max_new_tokens": 1,
    "min_new_tokens": 6, "do_sample": True, "num_beams": 2, "renormalize_logits": True,
    "exponential_decay_length_penalty": (1, 9.0), "sequence_bias": [[[4], -9.0]],
}  # fmt: skip


@pytest.mark.parametrize("name", LEAKS)
def test_nothing_of_generation_config_reaches_the_draw(name):
    plain, policy = tiny_policy(), tiny_policy()
    policy.model.generation_config = GenerationConfig(eos_token_id=1, **{name: LEAKS[name]})
    ours, theirs = draw(prepare(policy)), draw(plain)
    assert ours.text == theirs.text and len(set(theirs.text)) > 5
    assert all(torch.equal(a, b) for a, b in zip(ours.logprob, theirs.logprob, strict=True))


@pytest.mark.parametrize(
    "own, config, tokenizer, expected",
    [
        (3, None, "<eos>", [3, 1]),
        ([3, 4], 5, "<eos>", [3, 4, 5, 1]),
        (None, [5, 6], "<eos>", [5, 6, 1]),
        (3, -1, None, [3]),
        (1, 1, "<eos>", [1]),
    ],
)
def test_every_end_token_ends_a_response(own, config, tokenizer, expected):
    policy = tiny_policy()
    policy.tokenizer.eos_token = tokenizer and policy.tokenizer.convert_ids_to_tokens(1)
    policy.model.generation_config = GenerationConfig(eos_token_id=own)
    policy.model.config.eos_token_id = config
    prepare(policy)
    assert end_tokens(policy) == expected
    rollouts = draw(policy, max_response_tokens=30)
    ends = set()
    for tokens, prompt, cut in zip(
        rollouts.tokens, rollouts.prompt_len, rollouts.truncated, strict=True
    ):
        found = [t for t in tokens[prompt:].tolist() if t in expected]
        assert found == ([] if cut else [int(tokens[-1])])
        ends.update(found)
    assert len(ends) > 0.5 * len(expected)  # several of them occurred


SIZES = {"vocab_size": 14, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
NARROW = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2}


@pytest.mark.parametrize(
    "config, limit",
    [
        (GPT2Config(**SIZES, **GPT, n_positions=20), 20),
        (GPTNeoConfig(**SIZES, hidden_size=16, num_layers=1, num_heads=2,
                      attention_types=[[["global"], 1]], max_position_embeddings=20), 20),
        (GPTBigCodeConfig(**SIZES, **GPT, n_positions=20), 20),
        (OPTConfig(**SIZES, **NARROW, ffn_dim=16, word_embed_proj_dim=16,
                   max_position_embeddings=20), 20),
        (RobertaConfig(**SIZES | {"pad_token_id": 1, "eos_token_id": 2}, **NARROW,
                       intermediate_size=16, max_position_embeddings=22, is_decoder=True), 20),
        (Qwen2Config(**SIZES, **NARROW, num_key_value_heads=1, intermediate_size=16,
                     max_position_embeddings=20), 20),
        (Qwen2Config(**SIZES, **NARROW, num_key_value_heads=1, intermediate_size=16,
                     max_position_embeddings=10, rope_parameters={"rope_type": "linear",
                     "rope_theta": 1e4, "factor": 2.0}), 20),
        (BloomConfig(**SIZES, hidden_size=16, n_layer=1, n_head=2), None),
    ],
    ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_too_few_positions_are_refused_before_sampling(config, limit):
    tokenizer = tiny_policy().tokenizer
    policy = prepare(Policy(AutoModelForCausalLM.from_config(config), tokenizer))
    assert position_limit(policy.model) == limit
    longest = max(len(prompt_tokens(tokenizer, q.prompt)) for q in QUESTIONS)
    draw(policy, max_response_tokens=20 - longest)  # every position is of use
    if limit is not None:
        with pytest.raises(ValueError, match=r"max_response_tokens=13; expected at most 20"):
            draw(policy, max_response_tokens=13)


def test_a_run_with_too_few_positions_stops_at_the_door(tmp_path):
    model, data = save_arithmetic(tmp_path)
    about = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(about | {"max_position_embeddings": 32}))
    with pytest.raises(ValueError, match="max_response_tokens=64; expected at most 32 together"):
        train(
            TrainConfig(
                run_dir=str(tmp_path / "run"),
                model=str(model),
                data=str(data),
                reward="exact",
                max_response_tokens=64,
                eval_questions=6,
            )
        )


def test_frequencies_are_those_of_the_policy():
    """First tokens of 4000 draws against the softmax they are drawn from."""
    policy = tiny_policy()
    question = [Question("q", "12+3=", "")]
    rollouts = sample(
        policy,
        question,
        responses_per_question=4000,
        stream=(5,),
        max_prompt_tokens=9,
        max_response_tokens=1,
        batch_sequences=2000,
    )
    ids = policy.tokenizer("12+3=", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        p = torch.softmax(policy.model(input_ids=ids).logits[0, -1], -1)
    seen = torch.bincount(torch.stack([x[-1] for x in rollouts.tokens]), minlength=len(p)) / 4000
    assert ((seen - p).abs() < 5 * (p * (1 - p) / 4000).sqrt() + 1e-9).all()


def test_chat_template_is_used_where_there_is_one():
    tokenizer = tiny_policy().tokenizer
    plain = prompt_tokens(tokenizer, "1+1=")
    tokenizer.chat_template = "{% for m in messages %}={{ m['content'] }}{% endfor %}+"
    assert prompt_tokens(tokenizer, "1+1=") == [13, *plain, 12]
    assert prompt_tokens(tokenizer, [{"role": "user", "content": "1+1="}]) == [13, *plain, 12]


def test_too_long_prompt_is_named():
    with pytest.raises(ValueError, match="'012.345='.*max_prompt_tokens=7"):
        sample(
            tiny_policy(),
            QUESTIONS,
            responses_per_question=1,
            max_prompt_tokens=7,
            max_response_tokens=2,
            stream=(0,),
        )


def test_load_from_folder_and_refusals(tmp_path):
    policy = load_policy(str(save_byte_model(tmp_path / "model")))
    assert isinstance(policy, Policy)
    assert policy.tokenizer.padding_side == "left"
    began = time.perf_counter()
    with pytest.raises(ValueError, match="cannot load 'nobody/no-such-model'") as caught:
        load_policy("nobody/no-such-model")
    assert "\n" not in str(caught.value) and time.perf_counter() - began < 10


def test_no_hub_is_one_line_at_once(monkeypatch):
    def unreachable(name, timeout):
        raise OSError("no route\nto host")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("riskpo.model.load.model_info", unreachable)
    with pytest.raises(ConnectionError, match="is no folder.*no route") as caught:
        load_policy("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_is_refused():
    policy = tiny_policy()
    policy.model.generation_config = GenerationConfig()
    policy.tokenizer.eos_token = policy.model.config.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token"):
        prepare(policy)

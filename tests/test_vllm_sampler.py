"""The vLLM adapter on an engine of the same surface; vLLM itself needs a GPU and is unverified.

The engine below has its own copy of the weights, forgets them when it sleeps at level 2, and fails
where vLLM would: a call while asleep, a cache from before the weights changed.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from riskpo.records import Question
from riskpo.rollout import sample, stream_seed
from riskpo.samplers import SamplingLimits
from riskpo.vllm_sampler import SEEDS, VLLMSampler, drawn_logprobs, start_engine
from tests.toy import tiny_policy

QUESTIONS = [Question(p, p, "") for p in ("1+2=", "012+345=", "9=")]
LIMITS = SamplingLimits(max_prompt_tokens=20, max_response_tokens=12, temperature=0.7)


class Engine:
    def __init__(self, **settings):
        self.settings, self.calls = settings, []
        self.model = tiny_policy(seed=9).model
        self.weights_awake = self.cache_awake = self.cache_fresh = True

    def sleep(self, level):
        self.calls.append(f"sleep {level}")
        self.weights_awake = self.cache_awake = False
        with torch.no_grad():
            for p in self.model.parameters():
                p.fill_(float("nan"))

    def wake_up(self, tags):
        self.calls.append(f"wake {' '.join(tags)}")
        self.weights_awake |= "weights" in tags
        self.cache_awake |= "kv_cache" in tags

    def apply_model(self, function):
        assert self.weights_awake, "new weights for an engine that is asleep"
        self.calls.append("weights")
        self.cache_fresh = False
        return [function(self)]

    def load_weights(self, weights):
        """The model's own method in vLLM; (name, tensor) pairs, names as in from_pretrained."""
        own = dict(self.model.named_parameters())
        loaded = set()
        with torch.no_grad():
            for name, tensor in weights:
                own[name].copy_(tensor)
                loaded.add(name)
        return loaded

    def reset_prefix_cache(self):
        self.calls.append("reset")
        self.cache_fresh = True

    def generate(self, prompts, params, use_tqdm):
        assert self.weights_awake and self.cache_awake and self.cache_fresh and not use_tqdm
        self.calls.append("generate")
        self.params = params
        return [self.answer(p["prompt_token_ids"], s) for p, s in zip(prompts, params, strict=True)]

    def answer(self, prompt, s):
        outputs = []
        for index in reversed(range(s.n)):  # finished in any order
            g, tokens, logprobs, ids = torch.Generator(), [], [], list(prompt)
            g.manual_seed(s.seed + index)
            while len(tokens) < s.max_tokens and not set(tokens) & set(s.stop_token_ids):
                with torch.no_grad():
                    z = self.model(input_ids=torch.tensor([ids])).logits[0, -1] / s.temperature
                token = int(torch.multinomial(torch.softmax(z, -1), 1, generator=g))
                logprobs.append({token: SimpleNamespace(logprob=float(z.log_softmax(-1)[token]))})
                tokens.append(token)
                ids.append(token)
            outputs.append(SimpleNamespace(index=index, token_ids=tokens, logprobs=logprobs))
        return SimpleNamespace(outputs=outputs)


@pytest.fixture
def parts():
    policy, engine = tiny_policy(), Engine()
    engine.sleep(level=2)
    engine.calls.clear()
    return policy, engine, VLLMSampler(policy, engine, LIMITS, params=SimpleNamespace)


def test_order_of_wake_update_generate_sleep(parts):
    _, engine, sampler = parts
    sampler.sample(QUESTIONS, 2, (0, 1))
    woken = ["wake weights", "weights", "reset", "wake kv_cache", "generate"]
    assert engine.calls == woken
    sampler.sample(QUESTIONS, 1, (0, 1, "again"))
    assert engine.calls == [*woken, "generate"]  # nothing changed in between
    sampler.rest()
    sampler.rest()
    sampler.sample(QUESTIONS, 1, (0, 2))
    assert engine.calls == [*woken, "generate", "sleep 2", *woken]


def test_the_engine_has_the_weights_of_the_last_update(parts):
    policy, engine, sampler = parts
    for _ in range(2):
        sampler.sample(QUESTIONS, 1, (0, 1))
        own, theirs = policy.model.state_dict(), engine.model.state_dict()
        assert all(torch.equal(own[name], theirs[name]) for name in own)
        sampler.rest()
        with torch.no_grad():
            for p in policy.model.parameters():
                p.add_(0.01)


def test_log_probs_tokens_and_truncation(parts):
    policy, _, sampler = parts
    rollouts = sampler.sample(QUESTIONS, 8, (0, 1))
    assert rollouts.question_id == [q.id for q in QUESTIONS for _ in range(8)]
    assert any(rollouts.truncated) != all(rollouts.truncated)
    for row, tokens in enumerate(rollouts.tokens):
        prompt = rollouts.prompt_len[row]
        with torch.no_grad():
            z = policy.model(input_ids=tokens[None]).logits[0, prompt - 1 : -1] / 0.7
        expected = z.log_softmax(-1).gather(1, tokens[prompt:, None])[:, 0]
        torch.testing.assert_close(rollouts.logprob[row], expected, rtol=0, atol=1e-5)
        ended = int(tokens[-1]) == 1
        assert rollouts.truncated[row] != ended
        assert ended or len(tokens) - prompt == 12
    assert len(set(rollouts.text)) > 4


def test_settings_bend_nothing_and_seeds_belong_to_questions(parts):
    _, engine, sampler = parts
    whole = sampler.sample(QUESTIONS, 2, (0, 1))
    for question, s in zip(QUESTIONS, engine.params, strict=True):
        assert (s.n, s.temperature, s.max_tokens, s.stop_token_ids) == (2, 0.7, 12, [1])
        assert (s.top_p, s.top_k, s.min_p, s.repetition_penalty) == (1.0, 0, 0.0, 1.0)
        assert (s.presence_penalty, s.frequency_penalty, s.logprobs) == (0.0, 0.0, 0)
        assert s.seed == stream_seed(0, 1, question.id) % SEEDS
    alone = sampler.sample(QUESTIONS[1:2], 2, (0, 1))
    assert alone.text == whole.text[2:4]
    assert sampler.sample(QUESTIONS, 2, (0, 2)).text != whole.text


def test_both_samplers_draw_from_one_distribution(parts):
    """First tokens of one question: the frequencies of both samplers agree within 5 sigma."""
    policy, _, sampler = parts
    sampler.limits = SamplingLimits(20, 1, 0.7)
    ours = sampler.sample(QUESTIONS[:1], 400, (0,))
    theirs = sample(
        policy,
        QUESTIONS[:1],
        responses_per_question=400,
        max_prompt_tokens=20,
        max_response_tokens=1,
        temperature=0.7,
        stream=(0,),
    )
    a, b = (
        torch.bincount(torch.stack([x[-1] for x in r.tokens]), minlength=14) / 400
        for r in (ours, theirs)
    )
    sigma = ((a + b) / 2 * 2 / 400).sqrt()
    assert ((a - b).abs() <= 5 * sigma + 1e-9).all()


def test_the_engine_starts_asleep_with_processed_log_probs(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    engine = start_engine(
        "folder", dtype="bfloat16", tokens=96, sequences=64, gpu_share=0.3, seed=5
    )
    assert engine.calls == ["sleep 2"]
    assert engine.settings == {
        "model": "folder",
        "dtype": "bfloat16",
        "max_model_len": 96,
        "max_num_seqs": 64,
        "gpu_memory_utilization": 0.3,
        "enable_sleep_mode": True,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "seed": 5,
        "distributed_executor_backend": "external_launcher",
    }


def test_without_vllm_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"pip install 'riskpo\[vllm\]'"):
        start_engine("m", dtype="float32", tokens=9, sequences=1, gpu_share=0.3, seed=0)


def test_log_probs_that_vllm_leaves_out_are_nan():
    entry, none, nan = (SimpleNamespace(logprob=x) for x in (-0.5, None, float("nan")))
    got = drawn_logprobs([5, 6, 7, 8, 9], [{5: entry}, {6: none}, {7: nan}, {4: entry}, None])
    assert got[0] == -0.5 and torch.tensor(got[1:]).isnan().all()
    assert torch.tensor(drawn_logprobs([5, 6], None)).isnan().all()
    with pytest.raises(ValueError, match="got 1 log-probs for 2 drawn tokens"):
        drawn_logprobs([5, 6], [{5: entry}])

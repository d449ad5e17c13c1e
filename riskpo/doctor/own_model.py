"""A model's head on its own hidden states: beside its own logits, and every result in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from riskpo.doctor.check import Check
from riskpo.doctor.machine import DTYPES, numerics
from riskpo.doctor.problem import step_on
from riskpo.doctor.term_sizes import head_sizes
from riskpo.doctor.tolerance import bounds
from riskpo.model.load import load_policy
from riskpo_kernels import linear_logprob
from riskpo_kernels.causal_lm import decoder_of, find_head

TEXTS = (
    "Is 14 larger than 4? Answer Yes or No. Yes.",
    "The sea is wet, and so is the rain that falls into it.",
    "12 + 30 = 42",
    "A box holds 12 pencils. Tom has 3 boxes, so he has 36 pencils.",
)
OTHER_HEAD = "Its log-probs are not those of the model's own forward: report this model's config."


def model_checks(name: str) -> Iterator[Check]:
    """Lines on the model `name`, in float32: its own log-probs, then each dtype against float64.

    ValueError where it cannot be loaded or its head is refused.
    """
    policy = load_policy(name)
    read = policy.tokenizer(list(TEXTS), return_tensors="pt", padding=True, padding_side="right")
    ids, at = read["input_ids"].to(policy.device), read["attention_mask"].to(policy.device)
    with torch.no_grad():
        hidden = decoder_of(policy.model)(input_ids=ids, attention_mask=at).last_hidden_state
        logits = policy.model(input_ids=ids, attention_mask=at).logits[:, :-1]
        head = find_head(policy.model)
        if head.lora is not None:
            yield Check(None, f"head of {name}: has LoRA, which is not held against float64 here")
            return
        hidden, target, mask = hidden[:, :-1], ids[:, 1:], at[:, 1:].bool()
        ours = linear_logprob(hidden, head.weight, target, **head.keywords)
        wide = None if head.bias is None else head.bias.double()
        truth = linear_logprob(
            hidden.double(), head.weight.double(), target, bias=wide, scale=head.options.scale,
            softcap=head.options.softcap, backend="reference",
        )  # fmt: skip
    theirs = logits.double().log_softmax(-1).gather(-1, target[..., None])[..., 0]
    one, other, exact = (x[mask] for x in (ours.logprob, theirs, truth.logprob))
    size = head_sizes(
        hidden[mask] * head.options.scale, head.weight, target[mask], bias=head.bias,
        softcap=head.options.softcap,
    )["logprob"]  # fmt: skip
    # The two multiply in different orders, so the limit is wide; another head is off by far more.
    pairs = (bounds(x, exact, y, size=size, factor=8) for x, y in ((one, other), (other, one)))
    holds = all(bound.holds for pair in pairs for bound in pair)
    gap, (vocab, width) = float((one - other).abs().max()), head.weight.shape
    text = (
        f"head of {name} [{vocab:,}, {width:,}], log-probs of {len(one)} tokens beside its logits"
    )
    yield Check(holds, f"{text}: at most {gap:.0e} nats apart", "" if holds else OTHER_HEAD)
    if head.options.softcap is not None or head.bias is not None:
        yield Check(None, "softcap or bias on the head: no gradient is held against float64 here")
        return
    g = torch.Generator().manual_seed(0)
    h, w = sixteen(hidden * head.options.scale), sixteen(head.weight)
    problem = step_on(h, w, target.cpu(), mask.cpu(), g)
    for dtype in DTYPES:
        backend = "triton" if policy.device.type == "cuda" else "torch"
        yield numerics(backend, dtype, policy.device.type, problem)


def sixteen(x: torch.Tensor) -> torch.Tensor:
    """x rounded to float32 numbers that both 16-bit dtypes hold: one truth serves all dtypes."""
    return x.detach().cpu().bfloat16().half().float()

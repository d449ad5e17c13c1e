"""The recipes of preferences, DPO and KTO, against log-softmax of the models' own logits."""

import torch
from torch.nn.functional import logsigmoid

from tests.integrations.test_recipes import B, model_and_batch, near, padded, run, token_logp
from tests.toy import tiny_policy


def answers(m, inputs):
    """[B], from the model's own logits."""
    target = inputs["labels"][:, 1:]
    picked = token_logp(m, inputs).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return (picked * (target != -100)).sum(-1)


def test_dpo():
    model, chosen = model_and_batch()
    other, rejected = tiny_policy(seed=1).model, padded(model.config.vocab_size, seed=1)
    names = run("DPO")
    loss = names["dpo_loss"](model, other, tuple(chosen.values()), tuple(rejected.values()))

    margins = [answers(m, chosen) - answers(m, rejected) for m in (model, other)]
    near(loss, -logsigmoid(0.1 * (margins[0] - margins[1])).mean())
    loss.backward()
    assert model.lm_head.weight.grad.any() and other.lm_head.weight.grad is None


def test_kto():
    model, given = model_and_batch()
    other, rest = tiny_policy(seed=1).model, padded(model.config.vocab_size, seed=1)
    wanted = torch.arange(B) % 3 == 0
    names = run("KTO", answer_logprob=run("DPO")["answer_logprob"])
    rows = [tuple(x.values()) for x in (given, rest)]
    for first, second in ((model, other), (other, model)):  # the point of comparison moves in one
        loss = names["kto_loss"](first, second, *rows, wanted)
        z = max(float((answers(first, rest) - answers(second, rest)).detach().mean()), 0.0)
        margin = 0.1 * (answers(first, given) - answers(second, given) - z)
        near(loss, torch.where(wanted, 1 - margin.sigmoid(), 1 - (-margin).sigmoid()).mean())
    model.zero_grad()
    names["kto_loss"](model, other, *rows, wanted).backward()
    assert model.lm_head.weight.grad.any() and other.lm_head.weight.grad is None

"""The recipes of NeMo-RL and prime-rl, against log-softmax of the models' own logits."""

import torch

from tests.integrations.test_recipes import B, T, model_and_batch, near, run, token_logp


def test_nemo_rl():
    model, inputs = model_and_batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    names = run("NeMo-RL", model=model)
    got = names["token_logprobs"](model, ids, mask)
    want = token_logp(model, inputs).gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    assert got.shape == (B, T) and not got[:, 0].any()
    near(got[:, 1:], want)
    model.zero_grad()
    (got * torch.arange(T)).sum().backward()
    ours = model.lm_head.weight.grad.clone()
    model.zero_grad()
    (want * torch.arange(1, T)).sum().backward()
    torch.testing.assert_close(ours, model.lm_head.weight.grad, rtol=1e-4, atol=1e-4)


def test_prime_rl():
    model, inputs = model_and_batch()

    class Injected(torch.nn.Linear):
        """What inject_prime_lm_head puts there."""

    model.lm_head.__class__ = Injected
    weight = model.lm_head.weight
    run("prime-rl")["use_riskpo_head"](model)
    assert model.lm_head.weight is weight
    hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
    labels = inputs["input_ids"].roll(-1, 1)
    temperature = torch.linspace(0.5, 1.5, B * T).view(B, T)
    out = model.lm_head(hidden, labels, temperature)
    logp = (hidden @ weight.T / temperature[..., None]).log_softmax(-1)
    near(out["logprobs"], logp.gather(-1, labels[..., None])[..., 0])
    near(out["entropy"], -(logp.exp() * logp).sum(-1))
    near(model.lm_head(hidden)["logits"], hidden @ weight.T)

"""Every Python block of docs/recipes.md runs, and gives what plain PyTorch gives."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from riskpo_kernels import reference
from tests.toy import tiny_policy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
B, T, PROMPT = 8, 10, 3


def blocks() -> dict[str, list[str]]:
    """Python blocks by heading."""
    found: dict[str, list[str]] = {}
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading = section.split("\n", 1)[0].strip()
        found[heading] = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return found


BLOCKS = blocks()


def run(heading: str, number: int = 0, **names) -> dict:
    """The block's names after it ran; skips where it needs a package that is absent."""
    text = BLOCKS[heading][number]
    for package in re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    exec(compile(text, f"{PAGE.name}: {heading}", "exec"), names)
    return names


def padded(vocab: int, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(PROMPT + 1, T + 1, (B, 1), generator=g)
    attention_mask = (torch.arange(T) < lengths).long()
    input_ids = torch.randint(2, vocab, (B, T), generator=g) * attention_mask
    completion = attention_mask.bool() & (torch.arange(T) >= PROMPT)
    labels = input_ids.masked_fill(~completion, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def model_and_batch():
    model = tiny_policy().model
    return model, padded(model.config.vocab_size)


def token_logp(model, inputs, temperature: float = 1.0) -> torch.Tensor:
    """[B, T - 1, V] from the model's own logits."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[
        :, :-1
    ]
    return (logits.float() / temperature).log_softmax(-1)


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def softcapped():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.Gemma2Config(
        vocab_size=50, **sizes, **heads, final_logit_softcapping=2.0, bos_token_id=None
    )
    return transformers.Gemma2ForCausalLM(config)


@pytest.mark.parametrize("number", [0, 1, 2], ids=["plain", "one line", "head"])
def test_a_hugging_face_model(number):
    model = softcapped() if number else tiny_policy().model
    inputs = padded(model.config.vocab_size)
    names = run("A Hugging Face model", number, model=model, **inputs)
    logp, target = token_logp(model, inputs, (0.7, 0.7, 1.0)[number]), inputs["input_ids"][:, 1:]
    live = inputs["labels" if number == 1 else "attention_mask"][:, 1:]
    live = live != (-100 if number == 1 else 0)
    near(names["logprob"], logp.gather(-1, target[..., None])[..., 0] * live)
    near(names["entropy"], -(logp.exp() * logp).sum(-1) * live)


def test_supervised_fine_tuning():
    model, inputs = model_and_batch()
    names = run("Supervised fine-tuning", model=model, **inputs)
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    expected.backward()
    near(names["loss"], expected)
    near(gradient, model.lm_head.weight.grad)


def test_distillation():
    model, inputs = model_and_batch()
    teacher, mask = tiny_policy(seed=1).model, inputs["labels"][:, 1:] != -100
    names = run("Distillation", model=model, teacher=teacher, **inputs)
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    log_p, log_q = (token_logp(m, inputs, 0.6) for m in (model, teacher))
    expected = ((log_p.exp() * (log_p - log_q.detach())).sum(-1) * mask).sum() / mask.sum()
    expected.backward()
    near(names["loss"], expected)
    near(gradient, model.lm_head.weight.grad)
    assert teacher.lm_head.weight.grad is None

    top = token_logp(teacher, inputs).detach().topk(5)
    given = {"token_ids": top.indices, "teacher_logprob": top.values}
    names = run("Distillation", 1, model=model, **given, **inputs)
    p, q = (
        x.gather(-1, top.indices).exp()
        for x in (token_logp(model, inputs), token_logp(teacher, inputs))
    )
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    near(names["divergence"], (q * (q / p).log()).sum(-1) * mask)


def test_training_on_what_the_sampler_kept():
    model, inputs = model_and_batch()
    logp, target = token_logp(model, inputs), inputs["labels"][:, 1:]
    kept = logp.topk(6).indices
    kept = torch.where((kept == target[..., None]).any(-1, keepdim=True), -1, target[..., None])
    kept = torch.cat([logp.topk(6).indices, kept.masked_fill(kept == -100, -1)], -1)
    names = run("Training on what the sampler kept", model=model, kept=kept, **inputs)
    inside = torch.zeros_like(logp, dtype=torch.bool).scatter(-1, kept.clamp(min=0), True)
    inside &= (kept == 0).any(-1, keepdim=True) | (torch.arange(logp.shape[-1]) != 0)
    masked = logp.masked_fill(~inside, -torch.inf).log_softmax(-1)
    live = target != -100
    near(names["logprob"], masked.gather(-1, target.clamp(min=0)[..., None])[..., 0].where(live, 0))
    entropy = -(masked.exp() * masked.masked_fill(~inside, 0.0)).sum(-1)
    near(names["entropy"], entropy * live)


def test_logprobs_of_k_tokens():
    model, inputs = model_and_batch()
    logp = token_logp(model, inputs)
    ids = logp.topk(4).indices.flip(-1)
    names = run("Log-probs of K tokens", model=model, token_ids=ids, **inputs)
    near(names["logprob"], logp.gather(-1, ids))


def test_lora_on_the_head():
    model, inputs = model_and_batch()
    vocab, width = model.lm_head.weight.shape
    low = {"lora_a": torch.randn(3, width), "lora_b": torch.randn(vocab, 3)}
    low = {name: x.requires_grad_() for name, x in low.items()}
    names = run("LoRA on the head", model=model, **low, **inputs)
    got = [x.grad.clone() for x in low.values()]
    with torch.no_grad():
        hidden = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    merged = model.lm_head.weight.detach() + 2 * low["lora_b"] @ low["lora_a"]
    logp = (hidden.last_hidden_state[:, :-1] @ merged.T).log_softmax(-1)
    target = inputs["labels"][:, 1:]
    expected = logp.gather(-1, target.clamp(min=0)[..., None])[..., 0] * (target != -100)
    near(names["token"].logprob, expected)
    for x, y in zip(got, torch.autograd.grad(expected.sum(), list(low.values())), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert model.lm_head.weight.grad is None


def test_z_loss():
    model, inputs = model_and_batch()
    names = run("z-loss", model=model, **inputs)
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    kwargs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    logits, target = model(**kwargs).logits[:, :-1], inputs["labels"][:, 1:]
    z = 1e-4 * logits.logsumexp(-1).square()[target != -100].mean()
    expected = cross_entropy(logits.flatten(0, 1), target.flatten()) + z
    expected.backward()
    near(names["loss"], expected)
    near(gradient, model.lm_head.weight.grad)


def rollouts(model, steps: int = 2) -> list[dict[str, torch.Tensor]]:
    """Two answers to each of four questions, half of them right."""
    made = []
    for step in range(steps):
        inputs = padded(model.config.vocab_size, seed=step)
        with torch.no_grad():
            logp = token_logp(model, inputs)
        old = logp.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        noise = 1e-3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(step))
        made.append(
            {
                "input_ids": inputs["input_ids"],
                "attention_mask": inputs["attention_mask"],
                "completion_mask": inputs["labels"] != -100,
                "old_logprob": old + noise,
                "reward": torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 1]),
                "question": torch.arange(B) // 2,
            }
        )
    return made


def expected_run(model, batches) -> tuple[torch.nn.Module, dict]:
    """The same two steps from the reference ops, in one micro-batch."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    advantage_of = reference.RiskPOAdvantage("paper", bundle_size=2, baseline="leave-one-out")
    for step, batch in enumerate(batches):
        advantage, stats = advantage_of(batch["reward"], batch["question"], step=step)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
            :, :-1
        ]
        out = reference.riskpo_loss_from_logits(
            logits,
            batch["input_ids"][:, 1:],
            batch["old_logprob"],
            advantage,
            mask=batch["completion_mask"][:, 1:],
        )
        out.loss.backward()
        optimizer.step(), optimizer.zero_grad()
    return model, stats


def same_weights(model, expected, start) -> None:
    moved = False
    for a, b, c in zip(model.parameters(), expected.parameters(), start.parameters(), strict=True):
        near(a, b)
        moved |= not torch.equal(a, c)
    assert moved


def test_your_own_loop_with_accelerate():
    model, _ = model_and_batch()
    start, batches = copy.deepcopy(model), rollouts(model)
    names = run("Your own loop, with accelerate")
    steps = names["train"](model, torch.optim.SGD(model.parameters(), lr=0.1), batches)
    _, stats = list(steps)[-1]
    expected, expected_stats = expected_run(start, batches)
    same_weights(model, expected, start)
    assert stats["q_alpha_tracked"] == pytest.approx(expected_stats["q_alpha_tracked"])


def test_lightning(tmp_path):
    loop = run("Your own loop, with accelerate")
    names = run("Lightning", PolicyLoss=loop["PolicyLoss"])
    import lightning

    model, _ = model_and_batch()
    start, batches = copy.deepcopy(model), rollouts(model)
    module = names["RiskPOModule"](model)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    fit = lightning.Trainer(
        max_steps=2, accelerator="cpu", devices=1, enable_checkpointing=False, **quiet
    )
    fit.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    expected, stats = expected_run(start, batches)
    same_weights(model, expected, start)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["riskpo"]
    assert saved == module.advantage_of.state_dict() and saved["last_step"] == 1


@pytest.mark.parametrize("number, label", [(0, "RiskPO"), (1, "GRPO")], ids=["trainer", "head"])
def test_trl(tmp_path, monkeypatch, number, label):
    pytest.importorskip("trl", reason="trl is not installed: pip install 'riskpo[trl]'")
    from riskpo_kernels.causal_lm import fused
    from tests.integrations import trl_toy

    calls = []
    op = fused.linear_logprob

    def counted(*args, **kwargs):
        calls.append(1)
        return op(*args, **kwargs)

    monkeypatch.setattr(fused, "linear_logprob", counted)
    given = ("num_generations", "per_device_train_batch_size")
    settings = {k: v for k, v in trl_toy.SETTINGS.items() if k not in given}
    policy = tiny_policy()
    names = run(
        "TRL",
        number,
        model=policy.model,
        tokenizer=policy.tokenizer,
        reward=trl_toy.token_share,
        dataset=trl_toy.questions(),
        settings={**settings, "output_dir": str(tmp_path)},
    )
    trainer = names["trainer"]
    assert trainer._name == label and trainer.state.global_step == 2
    assert len(calls) == 2 * trainer.args.gradient_accumulation_steps
    logged = trainer.state.log_history[0]
    assert logged["grad_norm"] > 0
    assert ("riskpo/mvar" in logged) == (label == "RiskPO")


HERE = {
    "A Hugging Face model",
    "Supervised fine-tuning",
    "DPO",
    "KTO",
    "Distillation",
    "Training on what the sampler kept",
    "Log-probs of K tokens",
    "z-loss",
    "LoRA on the head",
    "Your own loop, with accelerate",
    "Lightning",
    "NeMo-RL",
    "TRL",
}


def test_nemo_rl_gets_log_probs_of_the_models_own_logits():
    model = tiny_policy().model
    ids = torch.randint(2, model.config.vocab_size, (2, 7))
    seen = torch.ones_like(ids).index_fill(1, torch.tensor([6]), 0)
    expected = model(ids, attention_mask=seen).logits[:, :-1].log_softmax(-1)
    expected = expected.gather(-1, ids[:, 1:, None])[..., 0] * seen[:, 1:]
    found = run("NeMo-RL", model=model)["token_logprobs"](model, ids, seen)
    assert found.shape == ids.shape and not found[:, 0].any() and found.requires_grad
    torch.testing.assert_close(found[:, 1:], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("heading", [h for h in BLOCKS if h not in HERE])
def test_a_block_without_a_test_of_its_own_runs_by_itself(heading):
    for number in range(len(BLOCKS[heading])):
        run(heading, number)


def test_the_headings_tested_here_are_on_the_page():
    assert HERE <= set(BLOCKS) and all(BLOCKS[heading] for heading in HERE)
    assert [len(BLOCKS[h]) for h in ("A Hugging Face model", "TRL")] == [3, 2]

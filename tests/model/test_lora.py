"""LoRA: what is trained, what the head costs, what is saved, what is sampled from."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("peft", reason="peft is not installed: pip install 'riskpo[lora]'")

from riskpo.algorithms import LossOptions  # noqa: E402
from riskpo.cli import main  # noqa: E402
from riskpo.config import LoraConfig, RunConfig, TrainConfig  # noqa: E402
from riskpo.model.load import load_policy  # noqa: E402
from riskpo.model.lora import attach_lora, plain_weights  # noqa: E402
from riskpo.model.packing import pack  # noqa: E402
from riskpo.report.logs import read_records  # noqa: E402
from riskpo.train import train  # noqa: E402
from riskpo.trainer.checkpoint import latest_checkpoint  # noqa: E402
from riskpo.trainer.update import surrogate  # noqa: E402
from riskpo_kernels.causal_lm import find_head  # noqa: E402
from tests.toy import random_rollouts, save_arithmetic, tiny_policy  # noqa: E402

IDS = torch.arange(2, 12)[None]
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")


@pytest.fixture
def adapted():
    """A tiny model whose adapters do something."""
    policy = tiny_policy()
    attach_lora(policy.model, LoraConfig(rank=4, alpha=8), seed=0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return policy


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_only_adapters_are_trained_and_start_without_effect():
    model = tiny_policy().model
    before = logits(model)
    attach_lora(model, LoraConfig(rank=4), seed=0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    assert torch.equal(logits(model), before)
    again = tiny_policy().model
    attach_lora(again, LoraConfig(rank=4), seed=0)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_the_head_or_the_embedding_is_refused(target):
    with pytest.raises(ValueError, match="lora: got an adapter on the (head|embedding).*targets"):
        attach_lora(tiny_policy().model, LoraConfig(rank=4, targets=("q_proj", target)), seed=0)


def test_the_frozen_head_costs_no_gradient():
    """The backward has one product less, the head's own, and nothing is stored."""
    rollouts = random_rollouts(14)
    batch = pack(rollouts, list(range(20)), torch.device("cpu"))

    def products(frozen: bool) -> int:
        model = tiny_policy().model
        model.lm_head.weight.requires_grad_(not frozen)
        plan = RunConfig(backend="torch")
        given = (batch, None, None, torch.ones(20), LossOptions(), plan, 20.0)
        result, _ = surrogate(model, find_head(model), *given)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            result.loss.backward()
        assert (model.lm_head.weight.grad is None) == frozen
        return sum(e.count for e in seen.key_averages() if e.key in PRODUCTS)

    assert products(frozen=False) - products(frozen=True) == 1


def test_merged_weights_are_the_adapted_model(adapted):
    merged = dict(plain_weights(adapted.model))
    plain = tiny_policy().model
    assert merged.keys() == dict(plain.named_parameters()).keys()
    assert (logits(adapted.model) - logits(plain)).abs().max() > 0.1
    plain.load_state_dict(merged)
    torch.testing.assert_close(logits(plain), logits(adapted.model), rtol=1e-4, atol=1e-4)


def config(folder, steps, **changes):
    settings = {
        "run_dir": str(folder / "run"),
        "model": str(folder / "model"),
        "data": str(folder / "sums.jsonl"),
        "reward": "tests.toy_reward:odd_length",
        "steps": steps,
        "questions_per_step": 5,
        "responses_per_question": 4,
        "max_response_tokens": 6,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "eval_every_steps": 0,
        "eval_questions": 4,
        "save_every_steps": 1,
        "lora": LoraConfig(rank=4),
    }
    return TrainConfig(**settings | changes)


def test_checkpoints_hold_the_adapter_and_resume_bitwise(tmp_path, capsys):
    save_arithmetic(tmp_path)
    whole = train(config(tmp_path, 3, run_dir=str(tmp_path / "whole")))
    train(config(tmp_path, 2))
    resumed = train(config(tmp_path, 3))
    ends = [latest_checkpoint(folder) for folder in (whole, resumed)]
    assert not (ends[0] / "model.safetensors").exists()
    one, other = (load_file(end / "adapter_model.safetensors") for end in ends)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert any(x.abs().max() > 0 for k, x in one.items() if "lora_B" in k)
    rewards = [[r["reward_mean"] for r in read_records(x, "step")] for x in (whole, resumed)]
    assert rewards[0] == rewards[1] and len(rewards[0]) == 3
    assert "resuming from" in capsys.readouterr().out
    # Loaded as from_pretrained does it, the model is the adapted one, and so is what eval samples.
    assert not torch.equal(
        logits(load_policy(str(ends[0])).model), logits(load_policy(str(tmp_path / "model")).model)
    )
    out = tmp_path / "result.json"
    arguments = (
        f"eval --model {whole} --data {tmp_path / 'sums.jsonl'} "
        "--reward tests.toy_reward:odd_length "
        f"--questions 3 --samples 2 --ks 1 --max-response-tokens 4 --out {out}"
    )
    assert main(arguments.split()) == 0
    assert json.loads(out.read_text())["questions"] == 3


def test_a_relative_model_is_found_from_another_folder(tmp_path, monkeypatch):
    save_arithmetic(tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = train(config(tmp_path, 1, model="model", data="sums.jsonl"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    adapted = load_policy(str(latest_checkpoint(folder)))
    assert not torch.equal(
        logits(adapted.model), logits(load_policy(str(tmp_path / "model")).model)
    )
    train(config(tmp_path, 2))  # the same paths, in full
    assert latest_checkpoint(folder).name == "step_000002"


def test_the_embedded_model_is_refused():
    with pytest.raises(ValueError, match="lora.rank with the embedded model"):
        train(TrainConfig(lora=LoraConfig(rank=4)))

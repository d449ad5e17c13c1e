"""Whole training runs on vLLM itself (its CPU build: make test-vllm); an engine in each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import riskpo.train
from riskpo.config import SamplerConfig, TrainConfig
from riskpo.model.load import Policy
from riskpo.report.logs import read_records
from riskpo.rollout.vllm import start_engine
from riskpo.train import train
from riskpo.trainer.checkpoint import latest_checkpoint
from tests.rollout.vllm_rig import WIDE, save_tiny
from tests.toy import save_arithmetic, tiny_config, tiny_policy

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: vLLM hands kernels memory that it does not mean to read."""


def settings(folder: Path, name: str, **changes) -> TrainConfig:
    """Few steps of GRPO; an untrained model earns the reward about half of the time."""
    return TrainConfig(
        **{
            "run_dir": str(folder / name),
            "model": str(folder / "wide"),
            "data": str(folder / "sums.jsonl"),
            "reward": f"{folder}/reward.py:odd_length",
            "algorithm": "grpo",
            "sampler": SamplerConfig(engine="vllm", correction="tis"),
            "updates_per_step": 2,
            "questions_per_step": 10,
            "responses_per_question": 4,
            "max_prompt_tokens": 32,
            "max_response_tokens": 8,
            "warmup_steps": 0,
            "learning_rate": 1e-3,
            "eval_questions": 6,
            "eval_samples": 2,
            "eval_every_steps": 2,
            "save_every_steps": 2,
            **changes,
        }
    )


@pytest.fixture
def folder(tmp_path):
    save_arithmetic(tmp_path)
    save_tiny(tmp_path / "wide")
    (tmp_path / "reward.py").write_text(
        "def odd_length(text, question):\n    return float(len(text) % 2)\n"
    )
    return tmp_path


def log(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if not k.endswith("_s")} for x in lines]


def test_resumed_is_bitwise_the_whole_run(folder, monkeypatch):
    whole = train(settings(folder, "whole", steps=4))
    steps = list(read_records(whole, "step"))
    assert max(r["grad_norm"] for r in steps) > 0.1
    for record in steps:  # the weights of each update, to float32's rounding
        assert 0 <= record["sampler_kl"] < 1e-8 and abs(record["sampler_ratio_max"] - 1) < 1e-3
        assert record["sampler_truncated"] == record["sampler_missing"] == 0
    cut = train(settings(folder, "cut", steps=2))
    state = torch.load(latest_checkpoint(cut) / "trainer.pt", weights_only=True)["random"]["torch"]
    after_start = []
    start = riskpo.train.start

    def watched(config):
        run = start(config)
        after_start.append(torch.get_rng_state())
        return run

    monkeypatch.setattr(riskpo.train, "start", watched)
    assert log(train(settings(folder, "cut", steps=4))) == log(whole)
    assert torch.equal(after_start[0], state)  # an engine, when it starts, seeds torch anew


def test_masked_weights_of_coarse_numbers(folder):
    """In bfloat16 engine and trainer round differently: MIS with a tight cap drops tokens."""
    sampler = SamplerConfig(engine="vllm", correction="mis", cap=1.01)
    run = train(settings(folder, "mis", steps=2, sampler=sampler, dtype="bfloat16"))
    for record in read_records(run, "step"):
        assert 1e-7 < record["sampler_kl"] < 0.05 and record["sampler_masked"] > 0
        assert record["sampler_ess"] < 1 and record["skipped_updates"] == 0


def test_two_processes_with_an_engine_each(folder):
    """The engine uses the run's group of processes, and ends before that does."""
    config = settings(folder, "two", steps=2)
    script = folder / "two.py"
    script.write_text(
        f"from riskpo.config import *\nfrom riskpo.train import train\ntrain({config!r})\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = list(read_records(folder / "two", "step"))
    one = list(read_records(train(settings(folder, "one", steps=2)), "step"))
    for ours, theirs in zip(two, one, strict=True):
        assert ours["reward_mean"] == theirs["reward_mean"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_experts_on_a_cpu_are_refused(tmp_path):
    """vLLM 0.32 leaves them unpacked after a reload, where its kernel reads packed ones."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    kept = tiny_config(14, **WIDE).to_dict()
    names = ("vocab_size", "num_hidden_layers", "eos_token_id", "pad_token_id", *WIDE)
    config = Qwen3MoeConfig(**{k: kept[k] for k in names}, **sizes, head_dim=32)
    policy = Policy(Qwen3MoeForCausalLM(config), tiny_policy().tokenizer)
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got a mixture of experts.*engine='generate'"):
        start_engine(str(tmp_path), dtype="float32", tokens=40, sequences=8, gpu_share=0.3, seed=0)

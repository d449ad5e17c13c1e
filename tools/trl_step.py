"""Steps of TRL's GRPO on a pretrained model: numbers, CPU time and peak memory.

    MALLOC_MMAP_THRESHOLD_=65536 python -m tools.trl_step MODEL_FOLDER KIND [STEPS]

KIND is `plain` (GRPOTrainer), `head` (the same with use_riskpo_head) or `riskpo` (RiskPOTrainer
with bundles of one and the mean, which is GRPO). Prints one JSON object. Of each step: CPU seconds
of the whole and of the loss and its gradients, and MiB that these take over what is held when they
begin, which is the model, and not yet its gradients.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from riskpo.integrations.trl.trainer import RiskPOConfig, RiskPOTrainer, use_riskpo_head
from riskpo.memory_plan.peak_meter import PeakMeter

QUESTIONS, GENERATIONS, LONGEST = 2, 4, 48
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "optim": "sgd",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": QUESTIONS * GENERATIONS,
    "num_generations": GENERATIONS,
    "max_completion_length": LONGEST,
    "beta": 0.0,
    "loss_type": "grpo",
    "scale_rewards": "none",
}
AS_GRPO = {"riskpo_form": "mean", "riskpo_bundle_size": 1, "importance_sampling_level": "token"}


def some_questions() -> Dataset:
    asked = [f"What is {a} + {b}? Explain in one sentence." for a in range(3, 7) for b in (2, 5)]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": x}]} for x in asked])


def many_letters(completions: list[Any], **_: Any) -> list[float]:
    """A reward with many values: the share of the letter e."""
    texts = [c[0]["content"] for c in completions]
    return [text.count("e") / max(len(text), 1) for text in texts]


class StepTimes(TrainerCallback):
    """CPU seconds and MiB of each step, seen from around a trainer's loss and gradients."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self.seen: list[dict[str, float]] = []
        self.model = trainer.model
        self.loss, self.backward = trainer.compute_loss, trainer.accelerator.backward
        trainer.compute_loss, trainer.accelerator.backward = self.watched_loss, self.watched_back
        trainer.add_callback(self)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen[-1]["step"] = time.process_time() - self.began

    def watched_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.meter = PeakMeter(torch.device("cpu"), self.model)
        began = time.process_time()
        value = self.loss(*args, **kwargs)
        self.seen.append({"update": time.process_time() - began})
        return value

    def watched_back(self, *args: Any, **kwargs: Any) -> None:
        began = time.process_time()
        self.backward(*args, **kwargs)
        self.seen[-1]["update"] += time.process_time() - began
        self.seen[-1]["mib"] = (self.meter.increase() or 0) / 2**20


def build(folder: str, kind: str, steps: int, out: str) -> GRPOTrainer:
    ours = kind == "riskpo"
    changes = AS_GRPO | {"epsilon": 0.2, "epsilon_high": 0.2} if ours else {}
    settings = SETTINGS | changes | {"max_steps": steps}
    args = (RiskPOConfig if ours else GRPOConfig)(output_dir=out, **settings)
    trainer = (RiskPOTrainer if ours else GRPOTrainer)(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=many_letters,
        args=args,
        train_dataset=some_questions(),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    if kind == "head":
        use_riskpo_head(trainer)
    return trainer


def run(folder: str, kind: str, steps: int = 2) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        trainer = build(folder, kind, steps, out)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        times = StepTimes(trainer)
        trainer.train()
    g = torch.Generator().manual_seed(0)
    moved = {n: p.detach() - before[n] for n, p in trainer.model.named_parameters()}
    probe = [float((d * torch.randn(d.shape, generator=g)).sum()) for d in moved.values()]
    logs = [x for x in trainer.state.log_history if "loss" in x]
    names = ("loss", "grad_norm", "entropy", "reward", "completions/mean_length")
    numbers = {name: [x.get(name) for x in logs] for name in names}
    return {"kind": kind, "moved": probe, **numbers, "steps": times.seen}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))))

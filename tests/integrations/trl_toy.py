"""Small questions, a tiny model and TRL trainers around it."""

from __future__ import annotations

from datasets import Dataset
from trl import GRPOConfig

from riskpo.demo import build_questions
from riskpo.integrations.trl.trainer import RiskPOConfig, RiskPOTrainer
from tests.toy import tiny_policy

GENERATIONS = 4
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "learning_rate": 1e-3,
    "optim": "sgd",
    "per_device_train_batch_size": 8,
    "num_generations": GENERATIONS,
    "max_completion_length": 6,
    "max_steps": 2,
}


def questions(count: int = 40) -> Dataset:
    rows = [
        {"prompt": q.prompt, "gold": q.gold, "pass_rate": i % 7 / 10}
        for i, q in enumerate(build_questions(count, 0))
    ]
    return Dataset.from_list(rows)


def token_share(completions, completion_ids, **_) -> list[float]:
    """A reward with many values that an untrained model earns at once."""
    return [sum(t % 3 for t in ids) / 4 for ids in completion_ids]


def config(folder, kind=RiskPOConfig, **changes):
    bundles = {"riskpo_bundle_size": 2} if kind is RiskPOConfig else {}
    return kind(**{"output_dir": str(folder), **SETTINGS, **bundles, **changes})


def trainer(
    folder, kind=RiskPOTrainer, policy=None, reward=token_share, eval_dataset=None, **changes
):
    """The same model, data and seed for either kind."""
    policy = tiny_policy() if policy is None else policy
    args = config(folder, RiskPOConfig if kind is RiskPOTrainer else GRPOConfig, **changes)
    return kind(
        model=policy.model,
        reward_funcs=reward,
        args=args,
        train_dataset=questions(),
        eval_dataset=eval_dataset,
        processing_class=policy.tokenizer,
    )


def losses(run) -> list[float]:
    """Of each optimiser step, as logged."""
    return [row["loss"] for row in run.state.log_history if "loss" in row]

"""Every setting of a run, in one place. Units are in the names; None means "what the algorithm's
row of riskpo/strategies.py says"."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `riskpo train`."""

    run_dir: str = "runs/demo"  # everything a run writes goes here
    algorithm: str = "riskpo-paper"  # a row of riskpo/strategies.py
    model: str | None = None  # folder or hub name of a causal LM; None: the embedded tiny model
    data: str | None = None  # jsonl / parquet file or hub name; None: the embedded arithmetic task
    eval_data: str | None = None  # None: a held-out part of data
    seed: int = 0
    steps: int = 300

    questions_per_step: int = 40
    responses_per_question: int = 8
    updates_per_step: int = 1  # mini-batches per batch of rollouts; above 1 is off-policy
    micro_batch_tokens: int = 8192  # packed tokens that go through the model at once

    max_prompt_tokens: int = 512
    max_response_tokens: int = 512
    temperature: float = 1.0

    learning_rate: float = 3e-4
    warmup_steps: int = 20
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    entropy_coef: float = 0.0

    bundle_size: int | None = None
    omega: float | None = None
    alpha: float | None = None
    beta: float | None = None
    baseline: str | None = None
    scale: str | None = None
    clip_low: float | None = None
    clip_high: float | None = None

    backend: str = "auto"  # of the fused loss: auto, triton, torch, reference
    memory_mib: int = 300  # workspace of the fused head
    device: str = "auto"
    dtype: str = "float32"  # of the weights: float32, bfloat16

    eval_every_steps: int = 50
    eval_questions: int = 200
    eval_samples: int = 8  # avg@k with k = this
    save_every_steps: int = 50
    log_with: tuple[str, ...] = ()  # besides JSONL: tensorboard, wandb, trackio
    verifier_workers: int = 2
    verifier_seconds: float = 5.0  # wall clock per answer

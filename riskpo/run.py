"""Set up a run: load, check and build everything before the first step, or resume a checkpoint."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from riskpo.algorithms import find_strategy
from riskpo.config import RunConfig, TrainConfig, is_embedded, resolve, to_toml, validate
from riskpo.data.questions import BOXED_INSTRUCTION, load_questions, priors_of, split_holdout
from riskpo.demo import build_model, build_tokenizer, find_task, task_questions, warm_start
from riskpo.distributed import Ranks, best_device
from riskpo.files import SETTINGS
from riskpo.group_advantages import Advantage
from riskpo.memory_plan.run_plan import RunPlan, plan_run
from riskpo.model.gguf import as_folder
from riskpo.model.isolation import settle_attention
from riskpo.model.load import Policy, load_policy_for, prepare
from riskpo.model.lora import attach_lora, thaw_lora
from riskpo.model.memory_switches import apply_switches
from riskpo.model.positions import check_positions
from riskpo.model.teacher import Teacher, load_teacher
from riskpo.model.vision import check_vision_head, check_vision_setup
from riskpo.preflight import check_teacher
from riskpo.report.logs import RunLog, SilentLog
from riskpo.rewards.scorer import MATH_KINDS, Scorer
from riskpo.rewards.verdict import Judge
from riskpo.rollout.generate import GenerateSampler
from riskpo.rollout.sampler import (
    Sampler,
    SamplingLimits,
    SharedSampler,
    read_prompts,
    shared_judge,
)
from riskpo.trainer.checkpoint import latest_checkpoint, owned, read_about, restore
from riskpo.trainer.optimizer import Optimizer
from riskpo.trainer.parallel import ParallelModel, skeleton
from riskpo.types import Question
from riskpo_kernels.causal_lm import Head, find_head

WARM_START_PROBE = 100  # training questions that measure the warm start's accuracy
MAX_WORKERS = 8  # verifier processes


@dataclass
class Run:
    """A run in progress, the same in each of its processes. `step` counts the finished steps."""

    config: RunConfig
    policy: Policy
    parallel: ParallelModel
    head: Head
    teacher: Teacher | None
    optimizer: Optimizer
    advantage: Advantage
    memory: RunPlan
    questions: list[Question]
    held_out: list[Question]
    scorer: Scorer
    judge: Judge
    sampler: Sampler
    log: RunLog | SilentLog
    step: int
    opened: ExitStack  # lock of the folder, log, verifiers, sampler

    def close(self) -> None:
        self.opened.close()


def start(given: TrainConfig) -> Run:
    """Load and check everything; resume if run_dir has a checkpoint. Cheap checks come first.

    ValueError for settings, data or a model that cannot be used.
    """
    config, overrides = resolve(given)
    validate(config)
    check_teacher(config)
    advantage = find_strategy(config.algorithm).advantage(config)
    ranks = Ranks.join()
    if ranks.size > 1 and config.memory.optimizer != "device":
        raise ValueError(
            f"memory.optimizer: got {config.memory.optimizer!r} with {ranks.size} processes; "
            "expected 'device'. Set memory.sharded to spread the optimiser's state over them."
        )
    with ExitStack() as opened:
        ranks.first(lambda: opened.enter_context(owned(config.run_dir)))
        return _start(config, overrides, advantage, ranks, opened)


def _start(
    config: RunConfig,
    overrides: dict[str, Any],
    advantage: Advantage,
    ranks: Ranks,
    opened: ExitStack,
) -> Run:
    """Set the run up in its locked folder; `opened` collects what has to be closed."""
    checkpoint = ranks.first(lambda: latest_checkpoint(config.run_dir))
    said: list[str] = []
    step = 0 if checkpoint is None else read_about(checkpoint, config, said.append)
    questions, held_out = load_data(config)
    priors_of(questions, config.columns.prior)
    log = open_log(config, overrides, checkpoint, step) if ranks.is_first else SilentLog()
    opened.callback(log.close)
    read = partial(load, config, checkpoint, questions, held_out, log.note)
    policy = load_sharded(ranks, read) if ranks.size > 1 and config.memory.sharded else read()
    if policy.processor:
        check_vision_setup(config, ranks.size)
    # Needs whole weights, which the first rank has until they are sharded.
    packing = ranks.first(lambda: settle_attention(policy.model, config.memory.attention))
    parallel = ParallelModel(policy.model, ranks, sharded=config.memory.sharded)
    head = parallel.look(find_head)
    teacher = load_teacher(config, policy, head)
    short, longest = ranks.first(lambda: fitting(policy, config, questions, log.note))
    held_out_short, longest_held_out = fitting(policy, config, held_out, log.note)
    memory = plan_run(config, policy.model, max(longest, longest_held_out), teacher)
    for line in (*said, *memory.lines(), *parallel.lines()):
        log.note(line)
    if policy.processor:
        check_vision_head(policy, head, [*questions, *held_out])
    workers = max(1, min(MAX_WORKERS, (os.cpu_count() or 1) // ranks.local_size))
    scorer = Scorer(config.reward, workers=workers, seconds=config.verifier_seconds)
    opened.callback(scorer.close)
    kept = ranks.first(lambda: usable(short, scorer, config, log.note))
    # Before the random states are restored: an engine resets them when it starts.
    sampler = SharedSampler(build_sampler(policy, config, parallel), ranks)
    opened.callback(sampler.close)
    apply_switches(policy.model, config.memory, packing=packing)
    optimizer = build_optimizer(policy, config)
    if checkpoint is not None:
        restore(checkpoint, optimizer=optimizer, advantage=advantage)
    return Run(
        config=config,
        policy=policy,
        parallel=parallel,
        head=head,
        teacher=teacher,
        optimizer=optimizer,
        advantage=advantage,
        memory=memory,
        questions=kept,
        held_out=held_out_short,
        scorer=scorer,
        judge=shared_judge(scorer.verdicts, ranks),
        sampler=sampler,
        log=log,
        step=step,
        opened=opened.pop_all(),
    )


def load_data(config: RunConfig) -> tuple[list[Question], list[Question]]:
    """(training, held-out) questions, a function of the settings alone."""
    if is_embedded(config.data):
        everything = task_questions(find_task(config.data), config.seed)
        return split_holdout(everything, config.eval_questions, config.seed)
    assert config.data is not None  # it would be embedded
    instruction = BOXED_INSTRUCTION if config.reward in MATH_KINDS else None
    questions = load_questions(config.data, instruction=instruction, columns=config.columns)
    if config.eval_data is None:
        return split_holdout(questions, config.eval_questions, config.seed)
    held_out = load_questions(config.eval_data, instruction=instruction, columns=config.columns)
    if config.eval_questions < len(held_out):
        _, held_out = split_holdout(held_out, config.eval_questions, config.seed)
    return questions, held_out


def load_sharded(ranks: Ranks, read: Callable[..., Policy]) -> Policy:
    """The policy, with weights on the first rank's CPU; other ranks get it on the meta device."""
    loaded: list[Policy] = []

    def outline() -> bytes:  # pickled here, so that every rank gets an error of it
        loaded.append(read(device="cpu"))
        return pickle.dumps(replace(loaded[0], model=skeleton(loaded[0].model)))

    outlined = ranks.first(outline)
    return loaded[0] if loaded else pickle.loads(outlined)


def load(
    config: RunConfig,
    checkpoint: Path | None,
    questions: Sequence[Question],
    held_out: Sequence[Question],
    note: Callable[[str], None],
    device: str | None = None,
) -> Policy:
    """The policy: of the checkpoint, else config.model, else the embedded model after warm-up."""
    if config.model is None and checkpoint is None:
        return warmed_up(config, questions, note)
    model = str(checkpoint or config.model)
    policy = load_policy_for([*questions, *held_out], model, dtype=config.dtype, device=device)
    if config.lora.rank and checkpoint is None:
        attach_lora(policy.model, config.lora, config.seed)
    elif config.lora.rank:
        thaw_lora(policy.model)
    return policy


def warmed_up(
    config: RunConfig, questions: Sequence[Question], note: Callable[[str], None]
) -> Policy:
    """The embedded model after supervised steps; the weights are a function of the seed."""
    task, tokenizer = find_task(config.data), build_tokenizer()
    policy = prepare(Policy(build_model(tokenizer, config.seed, task.model), tokenizer))
    policy.model.to(device=best_device())
    probe = list(questions[:WARM_START_PROBE])
    ask = GenerateSampler(policy, limits_of(config), config.sampler.sequences)

    def accuracy() -> float:
        gold = {q.id: q.gold for q in probe}
        rollouts = ask.sample(probe, 2, (config.seed, "warm start"))
        right = [gold[i] == t for i, t in zip(rollouts.question_id, rollouts.text, strict=True)]
        return sum(right) / len(right)

    note(f"warm start: supervised steps until {task.warm_target:.0%} of the answers are right")
    given = (policy.model, tokenizer, questions, task, accuracy)
    steps, reached = warm_start(*given, seed=config.seed)
    note(f"warm start: {steps} steps, {reached:.0%} of sampled answers right")
    for weight in policy.model.parameters():  # not .to(dtype): it would round the rotary buffers
        weight.data = weight.data.to(getattr(torch, config.dtype))
    return policy


def limits_of(config: RunConfig) -> SamplingLimits:
    lengths, kept = (config.max_prompt_tokens, config.max_response_tokens), config.sampler
    return SamplingLimits(*lengths, config.temperature, kept.top_k, kept.top_p, kept.min_p)


def build_sampler(policy: Policy, config: RunConfig, parallel: ParallelModel) -> Sampler:
    """This process's sampler, as config.sampler says."""
    settings, limits = config.sampler, limits_of(config)
    if settings.engine == "generate":
        return GenerateSampler(
            policy, limits, settings.sequences, settings.static_cache, parallel.whole
        )
    from riskpo.rollout.vllm import VLLMSampler, start_engine

    engine = start_engine(
        as_folder(str(config.model)),
        dtype=config.dtype,
        tokens=limits.max_prompt_tokens + limits.max_response_tokens,
        sequences=settings.sequences,
        gpu_share=settings.gpu_share,
        seed=config.seed,
    )
    return VLLMSampler(policy, engine, limits, look=parallel.look)


def build_optimizer(policy: Policy, config: RunConfig) -> Optimizer:
    return Optimizer(
        policy.model.parameters(),
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        state=config.memory.optimizer,
    )


def usable(
    questions: Sequence[Question], scorer: Scorer, config: RunConfig, note: Callable[[str], None]
) -> list[Question]:
    """The questions whose gold verifies against itself; ValueError if too few are left."""
    bad = scorer.check_golds(questions)
    if bad:
        note(f"data: left out {len(bad)} questions whose gold does not verify against itself:")
        for question, verdict in bad[:3]:
            note(f"  {question.id}: gold {question.gold[:60]!r}: {verdict.outcome.value}")
    refused = {question.id for question, _ in bad}
    kept = [q for q in questions if q.id not in refused]
    if len(kept) < config.questions_per_step:
        raise ValueError(
            f"data: got {len(kept)} usable questions; expected at least "
            f"questions_per_step={config.questions_per_step}. Lower that or give more data."
        )
    return kept


def fitting(
    policy: Policy, config: RunConfig, questions: Sequence[Question], note: Callable[[str], None]
) -> tuple[list[Question], int]:
    """(questions with a prompt of at most max_prompt_tokens tokens, tokens of the longest).

    Notes how many questions are left out. ValueError if the longest prompt with its response has
    more tokens than the model has positions.
    """
    most = config.max_prompt_tokens
    lengths = [len(read_prompts(policy, [q])[0][0]) for q in questions]
    kept = [q for q, length in zip(questions, lengths, strict=True) if length <= most]
    longest = max((length for length in lengths if length <= most), default=0)
    check_positions(policy.model, longest, config.max_response_tokens)
    if len(kept) < len(questions):
        note(
            f"data: left out {len(questions) - len(kept)} of {len(questions)} questions with more "
            f"than max_prompt_tokens={most} tokens"
        )
    return kept, longest


def open_log(
    config: RunConfig, overrides: dict[str, Any], checkpoint: Path | None, step: int
) -> RunLog:
    """Open the log and write the run's settings beside it."""
    log = RunLog(config, first_step=step)
    path = Path(config.run_dir) / SETTINGS
    path.write_text(to_toml(config), encoding="utf-8")
    log.note(f"riskpo: {config.algorithm}, seed {config.seed}, settings in {path}")
    if overrides:
        changes = ", ".join(f"{name}={value!r}" for name, value in overrides.items())
        log.note(f"demo: {config.algorithm} with {changes}; why: docs/demo.md")
    if checkpoint is not None:
        log.note(f"resuming from {checkpoint}")
    return log

"""RiskPO training, on one page: sample -> score -> advantage -> update -> log -> evaluate -> save.

riskpo/run.py sets a run up, riskpo/algorithms.py holds all that differs between algorithms. Under
torchrun every process runs this page; riskpo/distributed.py is how they communicate. There is no
value network, reference model, replay buffer or asynchronous sampler.

Q questions, G responses each, R = Q * G rollouts.
"""

from __future__ import annotations

import time
from pathlib import Path

from riskpo.algorithms import find_strategy, loss_options
from riskpo.config import TrainConfig
from riskpo.data.questions import priors_of
from riskpo.metrics.step import all_equal, by_stratum, covariances, risk_curves, sampled_entropy
from riskpo.report.progress import slow_progress
from riskpo.report.run_page import write_report
from riskpo.rewards.scorer import stop_if_all_crashed
from riskpo.rewards.verdict import metric_name, tally
from riskpo.rollout.collect import collect, shaped_rewards
from riskpo.run import Run, start
from riskpo.trainer.checkpoint import save_checkpoint
from riskpo.trainer.update import update
from riskpo.validation import evaluate_and_log, show_answers, show_first, some_texts


def train(config: TrainConfig) -> Path:
    """Train up to config.steps and return run_dir; resumes if run_dir has a checkpoint."""
    run = start(config)
    try:
        if run.step == 0:
            show_first(run)
            evaluate_and_log(run)
        elif run.step >= run.config.steps:
            run.log.note(f"all {run.step} steps are done; a larger --steps goes on from here")
        for step in range(run.step + 1, run.config.steps + 1):
            train_step(run, step)
            if due(step, run.config.eval_every_steps, run.config.steps):
                evaluate_and_log(run)
            if due(step, run.config.save_every_steps, run.config.steps):
                save(run)
        show_answers(run)
        run.log.note(run.memory.outcome())
        page = run.parallel.ranks.first(lambda: write_report(run.config.run_dir))
        run.log.note(f"curves, samples and settings: {page}; the curves alone: curves.png")
    finally:
        run.close()
    run.parallel.ranks.leave()
    return Path(run.config.run_dir)


def train_step(run: Run, step: int) -> None:
    """One step: sample, score, update, log."""
    c, began = run.config, time.perf_counter()
    strategy = find_strategy(c.algorithm)
    say = run.log.note
    with slow_progress(f"step {step}: sampling", say):
        batch = collect(run.sampler, run.judge, run.questions, strategy, c, step)
    sampled = time.perf_counter()
    outcomes, cut = tally(batch.seen_verdicts), batch.sampled.truncated
    stop_if_all_crashed(outcomes, run.scorer)
    numbers = {"reward_mean": float(batch.seen_QG.mean()), **risk_curves(batch.seen_QG)}
    numbers |= by_stratum(batch.seen, batch.seen_QG) | all_equal(batch.seen_QG)
    numbers["sampled_entropy"] = sampled_entropy(batch.sampled.logprob)
    if batch.questions:
        rewards_R = shaped_rewards(batch, strategy.overlong, c.max_response_tokens)
        ids, known = batch.rollouts.question_id, priors_of(batch.questions, c.columns.prior)
        prior = [known[q] for q in ids] if known else None
        advantage_R, risk = run.advantage(rewards_R, ids, step=step, prior=prior)
        run.parallel.ranks.agree(
            "advantages and tracker", [advantage_R, run.advantage.state_dict()]
        )
        run.sampler.rest()
        loss = loss_options(strategy, c)
        given = (run.parallel, run.head, run.optimizer, batch.rollouts, advantage_R, loss, c)
        with slow_progress(f"step {step}: updating", say):
            stats = update(*given, run.teacher)
        numbers = {**risk, **stats, **numbers, **covariances(batch)}
    else:
        run.log.note(f"step {step}: no question was kept, so there is no update")
    run.step = step
    run.log.texts(step, some_texts(batch, c.log_texts))
    numbers |= {metric_name(name): float(n) for name, n in outcomes.items()}
    numbers |= {
        "sampled_questions": float(len(batch.seen_QG)),
        "sampled_responses": float(batch.seen_QG.numel()),
        "learning_rate": run.optimizer.learning_rate,
        "truncated_fraction": sum(cut) / max(len(cut), 1),
        "sample_time_s": sampled - began,
        "time_s": time.perf_counter() - began,
    }
    run.log.step(step, numbers)


def save(run: Run) -> None:
    save_checkpoint(
        run.config.run_dir,
        step=run.step,
        parallel=run.parallel,
        tokenizer=run.policy.processor or run.policy.tokenizer,
        optimizer=run.optimizer,
        advantage=run.advantage,
        config=run.config,
    )


def due(step: int, every: int, last: int) -> bool:
    """Whether `step` is a multiple of `every`, or the last step; never if every is 0."""
    return every > 0 and (step % every == 0 or step == last)

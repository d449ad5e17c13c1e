"""Evaluation during a run: held-out numbers for the log, sample answers for people."""

from __future__ import annotations

import time
from typing import Any

import torch

from riskpo.metrics.evaluate import EvalResult, EvalSettings, evaluate, powers_of_two
from riskpo.metrics.step import by_stratum, sampled_entropy
from riskpo.report.progress import sampling_progress
from riskpo.rewards.scorer import stop_if_all_crashed
from riskpo.rollout.collect import Batch
from riskpo.run import Run
from riskpo.types import Question, texts_of

SHOWN_ANSWERS = 6
SHOWN_CHARACTERS = 2000  # of the first prompt and response


def show_first(run: Run) -> None:
    """Print one prompt with its special tokens, its gold, a sampled response and its reward.

    Warns of settings that are known not to learn.
    """
    question, c = run.questions[0], run.config
    rollouts = run.sampler.sample([question], 1, (c.seed, "first"))
    tokens, cut = rollouts.tokens[0], rollouts.prompt_len[0]
    parts = (tokens[:cut].tolist(), tokens[cut:].tolist())
    prompt, response = (run.policy.tokenizer.decode(part)[:SHOWN_CHARACTERS] for part in parts)
    (verdict,) = run.judge(rollouts.text, [question])
    run.log.note(f"first prompt ({question.id}), as the model reads it: {prompt!r}")
    run.log.note(f"  gold {question.gold[:200]!r}, sampled {response!r}")
    run.log.note(f"  reward {verdict.reward:g} ({verdict.outcome.value})")
    if c.algorithm == "riskpo-paper" and c.baseline in (None, "natural"):
        run.log.note(
            "warning: with riskpo-paper's own baseline no advantage is above zero: responses are "
            "only pushed down;\n  riskpo-loo (or --baseline leave-one-out) is the same objective "
            "with a centred baseline"
        )


def some_texts(batch: Batch, count: int) -> list[dict[str, Any]]:
    """`count` responses of a step, spread over its questions, kept or not, as rows for the log."""
    questions, each = batch.seen_QG.shape
    every = sorted(range(questions * each), key=lambda i: (i % each, i // each))
    return [
        {
            "question_id": batch.seen[i // each].id,
            "prompt": texts_of(batch.seen[i // each].prompt)[-1],
            "gold": batch.seen[i // each].gold,
            "response": batch.sampled.text[i],
            "verdict": batch.seen_verdicts[i].outcome.value,
            "reward": float(batch.seen_QG.flatten()[i]),
            "truncated": batch.sampled.truncated[i],
        }
        for i in every[:count]
    ]


def evaluate_and_log(run: Run) -> None:
    """Log avg@n and pass@k (k up to n), over all held-out questions and by stratum."""
    c, began = run.config, time.perf_counter()
    if not run.held_out:
        return
    responses = len(run.held_out) * c.eval_samples
    if run.step == 0:
        run.log.note(
            f"held out before training: {len(run.held_out)} questions, {responses} responses of at "
            f"most {c.max_response_tokens} tokens"
        )
    with sampling_progress(
        run.policy.model,
        responses=-(-responses // run.parallel.ranks.size),
        sequences=c.sampler.sequences,
        tokens=c.max_response_tokens,
        say=run.log.note,
    ):
        rollouts = run.sampler.sample(run.held_out, c.eval_samples, (c.seed, "held out"))
    result = evaluate(
        rollouts.text,
        run.held_out,
        run.judge(rollouts.text, run.held_out),
        samples=c.eval_samples,
        ks=powers_of_two(c.eval_samples),
        settings=EvalSettings(
            model=c.model or "embedded",
            data=c.eval_data or c.data or "embedded",
            temperature=c.temperature,
            max_response_tokens=c.max_response_tokens,
            seed=c.seed,
        ),
    )
    stop_if_all_crashed(result.counts, run.scorer)
    name = f"avg@{c.eval_samples}"
    interval = {f"{name}_low": result.avg.low, f"{name}_high": result.avg.high}
    strata = stratum_rows(run.held_out, result) | {"entropy": sampled_entropy(rollouts.logprob)}
    numbers = {**result.row(), **interval, **strata, "time_s": time.perf_counter() - began}
    run.log.evaluation(run.step, numbers, shown=(name, f"pass@{c.eval_samples}"))


def stratum_rows(questions: list[Question], result: EvalResult) -> dict[str, float]:
    """reward_S and solved_S by stratum; a question is solved when any response is right."""
    rewards_Qn = torch.tensor([result.rewards[q.id] for q in questions])
    solved = by_stratum(questions, (rewards_Qn > 0).any(1, keepdim=True).float())
    return by_stratum(questions, rewards_Qn) | {
        name.replace("reward", "solved"): value for name, value in solved.items()
    }


def show_answers(run: Run) -> None:
    """Print a few held-out questions, a response to each, and whether it is right."""
    questions = (run.held_out or run.questions)[:SHOWN_ANSWERS]
    texts = run.sampler.sample(questions, 1, (run.config.seed, "shown")).text
    verdicts = run.judge(texts, questions)
    for question, text, verdict in zip(questions, texts, verdicts, strict=True):
        said = "right" if verdict.reward > 0 else f"wrong, expected {question.gold[:60]!r}"
        run.log.note(f"{texts_of(question.prompt)[-1][:80]!r} -> {text[-120:]!r}  {said}")

"""What the held-out questions say about a run: numbers for the log, answers for people."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from riskpo.evaluate import EvalResult, EvalSettings, evaluate, powers_of_two
from riskpo.measures import by_stratum, sampled_entropy
from riskpo.records import Question
from riskpo.rewards import stop_if_all_crashed
from riskpo.start import Run

SHOWN_ANSWERS = 6


def evaluate_and_log(run: Run) -> None:
    """avg@n, pass@k for k up to n, and both by stratum, with random numbers of their own."""
    c, began = run.config, time.perf_counter()
    if not run.held_out:
        return
    settings = EvalSettings(
        model=c.model or "embedded",
        data=c.eval_data or c.data or "embedded",
        temperature=c.temperature,
        max_response_tokens=c.max_response_tokens or 0,
        seed=c.seed,
    )
    entropies = []

    def answers(questions: Sequence[Question], samples: int) -> list[str]:
        rollouts = run.sampler.sample(questions, samples, (c.seed, "held out"))
        entropies.append(sampled_entropy(torch.cat(rollouts.logprob)))
        return rollouts.text

    result = evaluate(
        answers,
        run.held_out,
        run.score,
        samples=c.eval_samples,
        ks=powers_of_two(c.eval_samples),
        settings=settings,
    )
    stop_if_all_crashed(result.counts, run.scorer)
    name = f"avg@{c.eval_samples}"
    interval = {f"{name}_low": result.avg.low, f"{name}_high": result.avg.high}
    strata = stratum_rows(run.held_out, result) | {"entropy": entropies[0]}
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
    """A few held-out questions, what the policy says now, and whether it is right."""
    questions = (run.held_out or run.questions)[:SHOWN_ANSWERS]
    texts = run.sampler.sample(questions, 1, (run.config.seed, "shown")).text
    rewards, _ = run.score(texts, questions)
    for question, text, reward in zip(questions, texts, rewards.tolist(), strict=True):
        asked = (
            question.prompt if isinstance(question.prompt, str) else question.prompt[-1]["content"]
        )
        verdict = "right" if reward > 0 else f"wrong, expected {question.gold[:60]!r}"
        run.log.note(f"{asked[:80]!r} -> {text[-120:]!r}  {verdict}")

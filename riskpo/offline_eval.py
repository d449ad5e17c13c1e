"""`riskpo eval`: avg@k and pass@k of a saved model, with intervals over questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from riskpo.arithmetic import find_task, task_questions
from riskpo.checkpoint import latest_checkpoint
from riskpo.config import DEMO, REAL, is_embedded
from riskpo.data import BOXED_INSTRUCTION, load_questions, split_holdout
from riskpo.evaluate import EvalResult, EvalSettings, evaluate
from riskpo.records import Question
from riskpo.rewards import Scorer
from riskpo.rollout import load_policy, sample, seed_everything

if TYPE_CHECKING:
    from riskpo.cli import EvalConfig


def evaluate_model(config: EvalConfig) -> EvalResult:
    """Load, sample, score, print; and write config.out where one is given."""
    model = str(latest_checkpoint(config.model) or config.model)
    policy = load_policy(model, dtype=config.dtype)
    default = (DEMO if is_embedded(config.data) else REAL)["max_response_tokens"]
    response_tokens = config.max_response_tokens or int(default)

    def answers(questions: Sequence[Question], samples: int) -> list[str]:
        return sample(
            policy,
            questions,
            responses_per_question=samples,
            max_prompt_tokens=config.max_prompt_tokens,
            max_response_tokens=response_tokens,
            temperature=config.temperature,
            batch_sequences=config.sample_sequences,
        ).text

    seed_everything(config.seed)
    with Scorer(config.reward) as scorer:
        result = evaluate(
            answers,
            questions_of(config),
            scorer.score,
            samples=config.samples,
            ks=[k for k in config.ks if k <= config.samples],
            settings=EvalSettings(
                model=model,
                data=config.data or "embedded",
                temperature=config.temperature,
                max_response_tokens=response_tokens,
                seed=config.seed,
            ),
        )
    print(report(result))
    if config.out is not None:
        result.write(Path(config.out))
    return result


def questions_of(config: EvalConfig) -> list[Question]:
    """The first `questions` of a data set, or what the demo with this seed held out."""
    if config.data is None or is_embedded(config.data):
        everything = task_questions(find_task(config.data), config.seed)
        return split_holdout(everything, config.questions, config.seed)[1]
    instruction = BOXED_INSTRUCTION if config.reward in ("auto", "math") else None
    return load_questions(config.data, limit=config.questions, instruction=instruction)


def report(result: EvalResult) -> str:
    """Numbers with their 95 % intervals, one per line, and the outcomes."""
    rows = [(f"avg@{result.samples}", result.avg)]
    rows += [(f"pass@{k}", estimate) for k, estimate in result.pass_at.items()]
    lines = [f"{name:<8} {e.value:.3f}  [{e.low:.3f}, {e.high:.3f}]" for name, e in rows]
    outcomes = "  ".join(f"{name} {count}" for name, count in result.counts.items() if count)
    return "\n".join([*lines, f"{result.questions} questions: {outcomes}"])

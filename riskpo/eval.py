"""`riskpo eval`: avg@n, pass@k and maj@k of a saved model, with intervals.

With several seeds the evaluation runs once per seed. A model path with "{seed}" names a training
run for each seed, evaluated on the embedded questions that this run held out. Any other path is one
model, sampled anew on the same questions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial

from riskpo.config import DEMO, RunConfig, is_embedded
from riskpo.data.questions import BOXED_INSTRUCTION, load_questions, split_holdout
from riskpo.demo import find_task, task_questions
from riskpo.eval_config import VERIFIER_SECONDS, EvalConfig
from riskpo.files import write_json
from riskpo.metrics.evaluate import EvalResult, EvalSettings, evaluate, over_seeds
from riskpo.model.load import load_policy_for
from riskpo.report.progress import sampling_progress
from riskpo.rewards.math import extract
from riskpo.rewards.scorer import MATH_KINDS, Scorer, stop_if_all_crashed
from riskpo.rollout.generate import GenerateSampler
from riskpo.rollout.sampler import SamplingLimits
from riskpo.trainer.checkpoint import latest_checkpoint
from riskpo.types import Question

RUN_PER_SEED = "{seed}"  # in a model's path


def evaluate_model(config: EvalConfig) -> list[EvalResult]:
    """Load, sample, score and print; write config.out if given. Returns a result per seed."""
    own = RUN_PER_SEED in config.model
    results = []
    for seed in config.seeds or (config.seed,):
        one = replace(config, model=config.model.replace(RUN_PER_SEED, str(seed)), seed=seed)
        results.append(evaluate_once(one, questions_of(one if own else config)))
    print(report(results, by_seed=bool(config.seeds)))
    if config.out is not None:
        write_json(config.out, seeds_as_json(results) if config.seeds else asdict(results[0]))
    return results


def evaluate_once(config: EvalConfig, questions: Sequence[Question]) -> EvalResult:
    """One model, sampled with one seed."""
    model = str(latest_checkpoint(config.model) or config.model)
    policy = load_policy_for(questions, model, dtype=config.dtype)
    default = DEMO["max_response_tokens"] if is_embedded(config.data) else None
    length = int(config.max_response_tokens or default or RunConfig.max_response_tokens)
    limits = SamplingLimits(config.max_prompt_tokens, length, config.temperature)
    sampler = GenerateSampler(policy, limits, config.sample_sequences)
    responses = len(questions) * config.samples
    say = partial(print, file=sys.stderr, flush=True)
    say(f"evaluation: {responses} responses of at most {length} tokens")
    with sampling_progress(
        policy.model, responses=responses, sequences=config.sample_sequences, tokens=length, say=say
    ):
        texts = sampler.sample(questions, config.samples, (config.seed,)).text

    with Scorer(config.reward, seconds=VERIFIER_SECONDS) as scorer:

        def vote(text: str, question: Question) -> str | None:
            exact = scorer.kind_of(question) == "exact"
            return (text.strip() if exact else extract(text)[0]) or None

        # Equal programs differ as texts, so a vote among programs means nothing.
        programs = any(scorer.kind_of(question).startswith("code") for question in questions)
        result = evaluate(
            texts,
            questions,
            scorer.verdicts(texts, questions),
            samples=config.samples,
            ks=config.ks or tuple(dict.fromkeys((1, config.samples))),
            settings=EvalSettings(
                model=model,
                data=(config.data or "embedded") + f", split {config.split}" * bool(config.split),
                temperature=config.temperature,
                max_response_tokens=length,
                seed=config.seed,
            ),
            vote=None if programs else vote,
        )
        stop_if_all_crashed(result.counts, scorer)
    return result


def questions_of(config: EvalConfig) -> list[Question]:
    """The first config.questions of a data set, or the embedded ones that a run holds out."""
    if config.data is None or is_embedded(config.data):
        everything = task_questions(find_task(config.data), config.seed)
        return split_holdout(everything, config.questions, config.seed)[1]
    instruction = BOXED_INSTRUCTION if config.reward in MATH_KINDS else None
    return load_questions(
        config.data,
        split=config.split or "train",
        limit=config.questions,
        instruction=instruction,
        columns=config.columns,
    )


def report(results: Sequence[EvalResult], by_seed: bool) -> str:
    """Numbers with their 95 % intervals over questions, one per line, and the outcomes. by_seed:
    with the intervals over seeds beside them."""
    lines = []
    if by_seed:
        lines = [f"{'':<8} {'':5}  {'over questions':<15}  over {len(results)} seeds"]
    for name, (e, s) in over_seeds(results).items():
        line = f"{name:<8} {e.value:.3f}  [{e.low:.3f}, {e.high:.3f}]"
        lines.append(line + f"   [{s.low:.3f}, {s.high:.3f}]" * by_seed)
    names = dict.fromkeys(name for r in results for name in r.counts)
    totals = {name: sum(r.counts.get(name, 0) for r in results) for name in names}
    outcomes = "  ".join(f"{name} {count}" for name, count in totals.items() if count)
    return "\n".join([*lines, f"{results[0].questions} questions{' each' * by_seed}: {outcomes}"])


def seeds_as_json(results: Sequence[EvalResult]) -> dict[str, object]:
    """Both intervals of every number, and every seed's whole result."""
    table = {
        name: {"over_questions": asdict(e), "over_seeds": asdict(s)}
        for name, (e, s) in over_seeds(results).items()
    }
    return {"numbers": table, "seeds": [asdict(r) for r in results]}

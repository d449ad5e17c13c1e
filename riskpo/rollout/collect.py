"""One step's batch of rollouts: sample, score, keep, and sample again if the algorithm wants more.

The questions of a step and the sampler's random numbers are functions of (seed, step, attempt)
alone, so a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from riskpo.algorithms import Strategy, keep_all, overlong_penalty
from riskpo.config import TrainConfig
from riskpo.rewards.verdict import Judge, Verdict
from riskpo.rollout.sampler import Sampler
from riskpo.types import Question, Rollouts

MAX_ATTEMPTS = 10  # rounds of dynamic sampling per step


@dataclass
class Batch:
    """What a step learns from, question-major, and everything that was sampled for it.

    questions, rollouts, rewards_QG       kept by the algorithm, to learn from
    seen, sampled, seen_verdicts, seen_QG all questions, their rollouts, verdicts and rewards
    """

    questions: list[Question] = field(default_factory=list)
    rollouts: Rollouts = field(default_factory=Rollouts)
    rewards_QG: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    seen: list[Question] = field(default_factory=list)
    sampled: Rollouts = field(default_factory=Rollouts)
    seen_verdicts: list[Verdict] = field(default_factory=list)
    seen_QG: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))


def draw(
    questions: Sequence[Question], count: int, *, seed: int, step: int, attempt: int = 0
) -> list[Question]:
    """`count` different questions for a step.

    Attempt 0 goes through epochs of a list that is shuffled anew each time; an epoch skips its last
    questions if they do not fill a batch. Later attempts draw at random.
    """
    if len(questions) < count:
        raise ValueError(
            f"draw: got {len(questions)} questions for training; expected at least "
            f"questions_per_step={count}. Lower questions_per_step or give more data."
        )
    if attempt:
        rng = random.Random(f"{seed}/{step}/{attempt}")
        return rng.sample(list(questions), count)
    per_epoch = len(questions) // count
    epoch, place = divmod(step - 1, per_epoch)
    order = _order(len(questions), seed, epoch)
    return [questions[i] for i in order[place * count : (place + 1) * count]]


@lru_cache(maxsize=1)  # an epoch has many steps
def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def collect(
    sampler: Sampler,
    judge: Judge,
    questions: Sequence[Question],
    strategy: Strategy,
    config: TrainConfig,
    step: int,
) -> Batch:
    """Rollouts and rewards of config.questions_per_step questions, or of fewer when dynamic
    sampling has used up its MAX_ATTEMPTS rounds."""
    count, seed = config.questions_per_step, config.seed
    batch, rewards, seen = Batch(), [], []
    for attempt in range(1 if strategy.keep is keep_all else MAX_ATTEMPTS):
        drawn = draw(questions, count, seed=seed, step=step, attempt=attempt)
        tried = {q.id for q in batch.seen}
        fresh = [q for q in drawn if q.id not in tried]
        if not fresh:
            continue
        rollouts = sampler.sample(fresh, config.responses_per_question, (seed, step, attempt))
        verdicts = judge(rollouts.text, fresh)
        rewards_QG = torch.tensor([v.reward for v in verdicts]).view(len(fresh), -1)
        kept = strategy.keep(rewards_QG).nonzero().flatten().tolist()
        kept = kept[: count - len(batch.questions)]
        each = rewards_QG.shape[1]
        batch.questions += [fresh[i] for i in kept]
        batch.rollouts.extend(rollouts, [i * each + j for i in kept for j in range(each)])
        rewards.append(rewards_QG[kept])
        seen.append(rewards_QG)
        batch.seen += fresh
        batch.sampled.extend(rollouts)
        batch.seen_verdicts += verdicts
        if len(batch.questions) == count:
            break
    batch.rewards_QG, batch.seen_QG = torch.cat(rewards), torch.cat(seen)
    return batch


def shaped_rewards(batch: Batch, overlong: float, max_response_tokens: int) -> torch.Tensor:
    """[R]: rewards plus the penalty for long responses.

    overlong is the share of max_response_tokens that is penalised. Algorithms with bundles have 0,
    so the penalty never enters a bundle's score.
    """
    buffer = int(overlong * max_response_tokens)
    penalty = [
        overlong_penalty(len(x), max_response_tokens, buffer) for x in batch.rollouts.logprob
    ]
    return batch.rewards_QG.flatten() + torch.tensor(penalty)

"""The update: from rollouts and advantages to new weights.

A mini-batch has one denominator, however many micro-batches and processes compute its loss. Every
process holds all rollouts and computes its share of each mini-batch.

R rollouts, T tokens of a micro-batch, S its sequences, D hidden width, V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import Any

import torch

from riskpo.algorithms import LossOptions
from riskpo.config import RunConfig
from riskpo.distributed import Ranks
from riskpo.model.dropout import train_without_dropout
from riskpo.model.packing import (
    IGNORE,
    Packed,
    denominator,
    hidden_states,
    micro_batches,
    mini_batches,
    pack,
)
from riskpo.model.teacher import Teacher
from riskpo.trainer.optimizer import Optimizer
from riskpo.trainer.parallel import ParallelModel
from riskpo.trainer.rollout_correction import (
    correction_weights,
    mismatch_numbers,
    warn_of_mismatch,
    warn_of_missing,
)
from riskpo.trainer.totals import Totals, count_loss, loss_numbers
from riskpo.types import Rollouts
from riskpo_kernels import SurrogateLoss, TokenLogProbs, clipped_surrogate, linear_logprob
from riskpo_kernels.causal_lm import Head

log = logging.getLogger("riskpo")

ByRow = dict[int, torch.Tensor]  # by rollout of this process: a number for each input token


def update(
    parallel: ParallelModel,
    head: Head,
    optimizer: Optimizer,
    rollouts: Rollouts,
    advantage: torch.Tensor,
    loss: LossOptions,
    config: RunConfig,
    teacher: Teacher | None = None,
) -> dict[str, float]:
    """Take config.updates_per_step optimiser steps on a batch of rollouts; returns numbers to log.

    advantage [R], detached. Mini-batches are whole questions, in order. The first update is
    on-policy: the old log-probs are the detached new ones, so every ratio is exactly 1. For later
    updates a forward pass over their rows gives the old log-probs before the first step; a sampler
    correction needs it over all rows. A teacher adds its divergence, a mean over the response
    tokens. skipped_responses have no gradient and are in no other number.
    """
    model, ranks, updates = parallel.model, parallel.ranks, config.updates_per_step
    advantage = advantage.to(next(model.parameters()).device, torch.float32)
    train_without_dropout(model)
    batches = mini_batches(rollouts, updates)
    skip = config.memory.skip_zero_advantage and not (config.entropy_coef or teacher)
    live = advantage.ne(0).tolist() if skip else None
    cuts = [share_of(rollouts, rows, config.micro_batch_tokens, ranks, live) for rows in batches]
    totals, own = Totals(), ByRow()
    warn_of_missing(rollouts, config.sampler)
    corrects = config.sampler.correction != "none"
    old = recompute(parallel, head, rollouts, sum(cuts if corrects else cuts[1:], []), config)
    weights = correction_weights(old, rollouts, config.sampler, totals)
    for turn, (rows, parts) in enumerate(zip(batches, cuts, strict=True)):
        # Gradients are averaged over the ranks, so that each divides by its part of the whole.
        share = denominator(rollouts, rows, loss.aggregate, loss.constant) / ranks.size
        total = advantage.new_zeros(())
        for i, part in enumerate(parts):
            batch = packed_or_idle(rollouts, part, advantage.device)
            before, weight = end_to_end(old if turn else {}, part), end_to_end(weights, part)
            given = (batch, before, weight, advantage[part or [0]], loss, config, share, teacher)
            with parallel.accumulating(last=i == len(parts) - 1):
                result, logprob = parallel(surrogate, head, *given)
                result.loss.backward()
            if not (turn or corrects):
                own |= by_row(part, batch, logprob)
            total += result.loss.detach()
            count_loss(totals, result.stats, len(part), loss.ratio)
        total = ranks.mean(total)
        norm, taken = optimizer.step(total)
        if not taken:
            told = "update skipped: loss %s, gradient norm %s; %d skipped so far"
            log.warning(told, float(total), norm, optimizer.skipped)
        totals.add({"steps": 1.0, "loss": float(total), "grad_norm": norm}, {})
    model.eval()
    correction_weights(own, rollouts, config.sampler, totals)
    totals.gather(ranks)
    numbers = loss_numbers(totals) | mismatch_numbers(totals, config.sampler)
    warn_of_mismatch(model, numbers["sampler_kl"])
    return numbers | {
        "skipped_updates": float(optimizer.skipped),
        "skipped_responses": float(live.count(False)) if live else 0.0,
    }


def share_of(
    rollouts: Rollouts, rows: list[int], budget: int, ranks: Ranks, live: list[bool] | None = None
) -> list[list[int]]:
    """This rank's micro-batches of a mini-batch, balanced by length; [] is an idle one.

    All ranks take the same number, at least one, since every forward is collective. Rows that are
    not `live` are left out.
    """
    if live is not None:
        rows = [row for row in rows if live[row]] or rows[:1]
    order = sorted(rows, key=lambda row: -len(rollouts.tokens[row]))
    cuts = [
        micro_batches(rollouts, sorted(order[rank :: ranks.size]), budget)
        for rank in range(ranks.size)
    ]
    idle: list[list[int]] = [[]] * (max(map(len, cuts)) - len(cuts[ranks.rank]))
    return cuts[ranks.rank] + idle


def packed_or_idle(rollouts: Rollouts, part: list[int], device: torch.device) -> Packed:
    """The micro-batch; an idle one becomes a sequence without counted tokens: its loss is 0."""
    if part:
        return pack(rollouts, part, device)
    batch = pack(rollouts, [0], device)
    return replace(batch, rows=[], target=torch.full_like(batch.target, IGNORE))


def by_row(part: list[int], batch: Packed, logprob: torch.Tensor) -> ByRow:
    """logprob [T] cut by rollout; an idle batch has a piece and no row."""
    return dict(zip(part, logprob.split(batch.lengths), strict=False))


def end_to_end(known: ByRow, part: list[int]) -> torch.Tensor | None:
    """The numbers of a micro-batch, [T]; None for an idle one, and if none are known."""
    return torch.cat([known[row] for row in part]) if known and part else None


def token_logprob(
    hidden: torch.Tensor, head: Head, batch: Packed, config: RunConfig, **options: Any
) -> TokenLogProbs:
    """linear_logprob of the batch's targets, [T]."""
    return linear_logprob(
        hidden,
        head.weight,
        batch.target,
        temperature=config.temperature,
        support=batch.support,
        memory_mib=config.memory.head_mib,
        backend=config.backend,
        **head.keywords,
        **options,
    )


def surrogate(
    model: Any,
    head: Head,
    batch: Packed,
    old: torch.Tensor | None,
    weight: torch.Tensor | None,
    advantage: torch.Tensor,
    loss: LossOptions,
    config: RunConfig,
    share: float,
    teacher: Teacher | None = None,
) -> tuple[SurrogateLoss, torch.Tensor]:
    """(the micro-batch's part of the loss, the log-probs [T] that it was computed from).

    old     log-probs [T] from before the first step; None: on-policy, the detached new ones
    weight  importance weights [T] of `correction_weights`; None without a correction
    """
    hidden = hidden_states(model, batch)
    token = token_logprob(hidden, head, batch, config, return_entropy=True)
    result = clipped_surrogate(
        token.logprob,
        token.logprob.detach() if old is None else old,
        advantage,
        cu_seqlens=batch.cu_seqlens,
        mask=batch.target != IGNORE,
        entropy=token.entropy,
        backend=config.backend,
        entropy_coef=config.entropy_coef,
        denominator=share,
        prompt_tokens=batch.prompt_tokens,
        correction=weight,
        advantage_per="sequence",
        correction_per="token",
        **asdict(loss),
    )
    if teacher is not None:
        apart = teacher.divergence(hidden, head, batch, config).sum()
        mean = apart.detach() / result.stats["tokens"].clamp(min=1)
        stats = result.stats | {"divergence": mean}
        result = SurrogateLoss(result.loss + apart / share, stats)
    return result, token.logprob.detach()


@torch.no_grad()
def recompute(
    parallel: ParallelModel,
    head: Head,
    rollouts: Rollouts,
    parts: list[list[int]],
    config: RunConfig,
) -> ByRow:
    """The trainer's own log-probs, 0 inside the prompt."""

    def logprob(model: Any, batch: Packed) -> torch.Tensor:
        return token_logprob(hidden_states(model, batch), head, batch, config).logprob

    device = next(parallel.model.parameters()).device
    found = ByRow()
    for part in parts:
        batch = packed_or_idle(rollouts, part, device)
        found |= by_row(part, batch, parallel(logprob, batch))
    return found

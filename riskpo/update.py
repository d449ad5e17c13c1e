"""From rollouts and advantages to new weights.

The loss of a mini-batch has one denominator, whatever number of micro-batches it takes.

R rollouts, T tokens of a micro-batch, S its sequences, D hidden width, V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch

from riskpo.head import Head
from riskpo.optimizer import Optimizer
from riskpo.packing import (
    Packed,
    denominator,
    hidden_states,
    micro_batches,
    mini_batches,
    pack,
)
from riskpo.records import Rollouts
from riskpo.strategies import LossOptions
from riskpo_kernels import SurrogateLoss, linear_logprob, riskpo_loss

log = logging.getLogger("riskpo")


@dataclass(frozen=True)
class UpdatePlan:
    """How a batch of rollouts is cut and fed; the mathematics is in LossOptions."""

    updates: int = 1
    micro_batch_tokens: int = 8192
    temperature: float = 1.0
    entropy_coef: float = 0.0
    backend: str = "auto"
    memory_mib: int = 300
    skip_zero_advantage: bool = False


def update(
    model: Any,
    head: Head,
    optimizer: Optimizer,
    rollouts: Rollouts,
    advantage: torch.Tensor,
    loss: LossOptions,
    plan: UpdatePlan,
) -> dict[str, float]:
    """Take `plan.updates` optimiser steps on one batch of rollouts; returns numbers to log.

    advantage [R], detached. Mini-batches are whole questions in their order. With one update the
    data are on-policy and the old log-probs are the detached new ones, so every ratio is exactly
    1; with more the trainer recomputes them once, before the first step (the sampler's own are
    rounded differently).
    """
    device = next(model.parameters()).device
    advantage = advantage.to(device, torch.float32)
    model.train()
    old = recompute(model, head, rollouts, plan) if plan.updates > 1 else None
    tally = _Tally()
    for rows in mini_batches(rollouts, plan.updates):
        share = denominator(rollouts, rows, loss.aggregate, loss.constant)
        total = torch.zeros((), device=device)
        if plan.skip_zero_advantage and not plan.entropy_coef:
            counts = advantage.ne(0).tolist()
            rows = [row for row in rows if counts[row]] or rows[:1]
        for part in micro_batches(rollouts, rows, plan.micro_batch_tokens):
            batch = pack(rollouts, part, device)
            old_logprob = None if old is None else torch.cat([old[row] for row in part])
            result = surrogate(model, head, batch, old_logprob, advantage[part], loss, plan, share)
            result.loss.backward()
            total += result.loss.detach()
            tally.add(result.stats, len(part) if loss.ratio == "sequence" else None)
        norm, taken = optimizer.step(total)
        if not taken:
            log.warning(
                "update skipped: loss %s, gradient norm %s; %d skipped so far",
                float(total),
                norm,
                optimizer.skipped,
            )
        tally.step(float(total), norm)
    model.eval()
    return tally.numbers() | {"skipped_updates": float(optimizer.skipped)}


def surrogate(
    model: Any,
    head: Head,
    batch: Packed,
    old_logprob: torch.Tensor | None,
    advantage: torch.Tensor,
    loss: LossOptions,
    plan: UpdatePlan,
    share: float,
) -> SurrogateLoss:
    """The micro-batch's part of the loss; without old log-probs it is on-policy.

    The sampler's log-probs stand in as a reference without weight: its "kl" is the mismatch
    between sampler and trainer.
    """
    return riskpo_loss(
        hidden_states(model, batch),
        head.weight,
        batch.target,
        old_logprob,
        advantage,
        cu_seqlens=batch.cu_seqlens,
        bias=head.bias,
        temperature=plan.temperature,
        return_entropy=True,
        memory_mib=plan.memory_mib,
        backend=plan.backend,
        entropy_coef=plan.entropy_coef,
        denominator=share,
        ref_logprob=batch.sampled,
        **asdict(head.options),
        **asdict(loss),
    )


@torch.no_grad()
def recompute(model: Any, head: Head, rollouts: Rollouts, plan: UpdatePlan) -> list[torch.Tensor]:
    """The trainer's own log-probs: R tensors, one entry per input token, 0 inside the prompt."""
    device = next(model.parameters()).device
    found: list[torch.Tensor] = []
    for part in micro_batches(rollouts, range(len(rollouts)), plan.micro_batch_tokens):
        batch = pack(rollouts, part, device)
        token = linear_logprob(
            hidden_states(model, batch),
            head.weight,
            batch.target,
            bias=head.bias,
            temperature=plan.temperature,
            memory_mib=plan.memory_mib,
            backend=plan.backend,
            **asdict(head.options),
        )
        found += token.logprob.split(batch.cu_seqlens.diff().tolist())
    return found


class _Tally:
    """Sums of a step's numbers, weighted by tokens or by what a ratio belongs to."""

    MEANS_OF_UNITS = ("clip_fraction", "clip_low_fraction", "clip_high_fraction", "ratio_mean")

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.units = self.tokens = 0.0
        self.ratio_max = 0.0
        self.steps: list[tuple[float, float]] = []

    def add(self, stats: dict[str, torch.Tensor], sequences: int | None) -> None:
        """A micro-batch's stats; `sequences` where each sequence has one ratio."""
        tokens = float(stats["tokens"])
        units = tokens if sequences is None else sequences
        self.units += units
        self.tokens += tokens
        for name in (*self.MEANS_OF_UNITS, "zero_coefficient_fraction", "entropy", "kl"):
            weight = units if name in self.MEANS_OF_UNITS else tokens
            self.sums[name] = self.sums.get(name, 0.0) + weight * float(stats[name])
        self.ratio_max = max(self.ratio_max, float(stats["ratio_max"]))

    def step(self, loss: float, norm: float) -> None:
        self.steps.append((loss, norm))

    def numbers(self) -> dict[str, float]:
        """The step's loss and gradient norm are means over its updates."""
        means = {
            name: value / max(self.units if name in self.MEANS_OF_UNITS else self.tokens, 1.0)
            for name, value in self.sums.items()
        }
        loss, norm = (sum(x) / len(self.steps) for x in zip(*self.steps, strict=True))
        return means | {
            "sampler_kl": means.pop("kl"),
            "loss": loss,
            "grad_norm": norm,
            "ratio_max": self.ratio_max,
            "tokens": self.tokens,
        }

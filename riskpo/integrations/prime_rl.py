"""RiskPO in prime-rl: a custom loss by import path, and bundles for its orchestrator.

    [trainer.loss]
    type = "custom"
    import_path = "riskpo.integrations.prime_rl.riskpo_loss"

prime-rl has no hook for advantages. A new one is an Algorithm class inside its repository, and gets
one question group at a time, while a bundle needs several: `BundleBuffer` holds groups until a
batch of them is complete. Bundling a group with the scores of earlier ones would need no buffer,
but is another estimator and not offered here.

Checked against prime-rl's documentation and its loss module as of August 2026: custom_fn(inputs,
**kwargs), LossInputs, LossOutputs, division by the global number of tokens outside. Not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from riskpo.integrations.common import CountedAdvantage, sequence_advantage
from riskpo_kernels import clipped_surrogate

OP = "riskpo in prime-rl"


def riskpo_loss(
    inputs: Any,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    dual_clip: float | None = None,
    mean_tokens: float | None = None,
) -> Any:
    """prime-rl's LossOutputs of one sequence: clipped surrogate of its length-normalised ratio.

    inputs       LossInputs, tensors [T]. The ratio is to inference_logprobs; a token for which that
                 is NaN, as vLLM may give, does not count (metric riskpo_sampler_missing).
                 loss_weights multiply the surrogate by their mean
    mean_tokens  None: every token weighs the same, since prime-rl divides the sum over sequences by
                 the batch's tokens. M: the sequence's mean times M, which is the paper's mean over
                 sequences if M is the batch's mean length

    ValueError if advantages differ within the sequence, and for mean_tokens of 0 or less.
    """
    from prime_rl.trainer.rl.loss import LossOutputs

    if mean_tokens is not None and not mean_tokens > 0:
        raise ValueError(
            f"{OP}: got mean_tokens={mean_tokens}; expected a number above 0. Give the batch's "
            "mean length in tokens."
        )
    missing = inputs.inference_logprobs.isnan() & (inputs.loss_mask != 0)
    mask = (inputs.loss_mask != 0)[None] & ~missing[None]
    weights = inputs.loss_weights
    loss, stats = clipped_surrogate(
        inputs.trainer_logprobs[None],
        inputs.inference_logprobs[None].detach(),
        sequence_advantage(OP, inputs.advantages[None], mask),
        mask=mask,
        ratio="sequence",
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        correction=None if weights is None else weights[None].detach(),
        aggregate="sequence-sum" if mean_tokens is None else "sequence-mean",
        denominator=1.0 if mean_tokens is None else 1.0 / mean_tokens,
    )
    metrics = {f"riskpo_{name}": stats[name] for name in ("ratio_mean", "clip_fraction")}
    return LossOutputs(loss=loss, metrics=metrics | {"riskpo_sampler_missing": missing.sum()})


class BundleBuffer:
    """Collects finished question groups and gives all their advantages at once.

    questions  groups per batch, a multiple of bundle_size
    settings   preset, and the overrides of RiskPOAdvantage

    Groups may arrive in any order; how old their policies may be is yours to limit.
    difficulty="history" knows a question by the name that `add` gets. Save state_dict() with the
    orchestrator's checkpoint. Groups that still wait are not in it and must be sampled again.
    """

    def __init__(self, questions: int, **settings: Any) -> None:
        self._advantage = CountedAdvantage(OP, settings, names_stay=True)
        self.state_dict = self._advantage.state_dict
        self.load_state_dict = self._advantage.load_state_dict
        bundle = self._advantage.advantage.settings.bundle_size
        if questions < bundle or questions % bundle:
            raise ValueError(
                f"{OP}: got questions={questions}; expected a multiple of bundle_size={bundle}."
            )
        self._questions = questions
        self._waiting: dict[str, list[float]] = {}

    def add(self, question: str, rewards: Sequence[float]) -> dict[str, list[float]]:
        """{} while the batch fills; then the advantages of every group in it, in reward order.

        ValueError on a question that already waits, and as RiskPOAdvantage raises.
        """
        if question in self._waiting:
            raise ValueError(
                f"{OP}: got question {question!r} twice in one batch; expected an id per group. "
                "Number its copies."
            )
        self._waiting[question] = [float(reward) for reward in rewards]
        if len(self._waiting) < self._questions:
            return {}
        groups, self._waiting = self._waiting, {}
        names = [name for name, group in groups.items() for _ in group]
        draws = [draw for group in groups.values() for draw in range(len(group))]
        flat = torch.tensor([reward for group in groups.values() for reward in group])
        values = iter(self._advantage(flat, names, draws)[0].tolist())
        return {name: [next(values) for _ in group] for name, group in groups.items()}

"""RiskPOTrainer: TRL's GRPOTrainer with RiskPO's advantages and loss.

    generation batch: rewards of all ranks -> bundles -> risk -> advantages -> each rank's own
    micro-batch:      model -> linear_logprob -> clipped_surrogate, global denominators

Every rank gathers the same numbers, so the tracked quantiles are the same on all of them. They move
once per generation batch and never in evaluation. Other minor versions of TRL than the tested one
are refused, since this module overrides methods that are not public.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from riskpo.files import write_json
from riskpo.integrations.common import (
    STATE_FILE,
    CountedAdvantage,
    check_window,
    missing_state,
    read_state,
)

check_window("trl", "1.16", "1.17")

from accelerate.utils import broadcast_object_list, gather_object  # noqa: E402
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

from riskpo.integrations.trl.config import AGGREGATES, RiskPOConfig  # noqa: E402
from riskpo.integrations.trl.head import use_riskpo_head  # noqa: E402
from riskpo.integrations.trl.rows import answer_key, prior_of, question_ids, question_key  # noqa: E402
from riskpo_kernels import clipped_surrogate  # noqa: E402

__all__ = ["STATE_FILE", "RiskPOConfig", "RiskPOTrainer", "use_riskpo_head"]

OP = "RiskPOTrainer"


class RiskPOTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages come from RiskPO and whose loss from riskpo_kernels.

    Arguments are GRPOTrainer's, with args a RiskPOConfig. What differs from GRPO:

      advantages   RiskPOAdvantage over the whole generation batch, also in TRL's completion table.
                   Its statistics are logged as riskpo/*. Its step counts generation batches, not
                   optimiser steps.
      evaluation   no bundles: advantages are 0 and the tracker rests. Read eval_reward; eval_loss
                   is 0 but for the KL and entropy terms.
      loss         clipped_surrogate with TRL's denominators, over all ranks and micro-batches. The
                   metrics clip_ratio/low_min and high_max are not reported.
      checkpoints  hold riskpo_state.json too. A resumed run refuses other RiskPO settings than the
                   saved ones. In the middle of a generation batch it samples a new one, as TRL.

    TypeError if args is no RiskPOConfig. ValueError for environments, for what `use_riskpo_head`
    refuses if riskpo_head is on, and for a completion without any reward.
    """

    _tag_names = ["trl", "riskpo"]
    _name = "RiskPO"
    _paper = {
        "title": "RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM "
        "Post-Training",
        "id": "2510.00911",
    }

    args: RiskPOConfig
    model: Any
    num_generations: int
    max_completion_length: int
    _logs: dict[str, Any]

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kwargs: Any
    ) -> None:
        if not isinstance(args, RiskPOConfig):
            raise TypeError(
                f"{OP}: got args of type {type(args).__name__}; expected a RiskPOConfig. It takes "
                "every argument of GRPOConfig."
            )
        if kwargs.get("environment_factory") is not None:
            raise ValueError(
                f"{OP}: got an environment_factory; expected a dataset of questions: bundles need "
                "several answers to the same one. Use GRPOTrainer for environments."
            )
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        settings = {"preset": args.riskpo_preset} | args.overrides()
        self.riskpo = CountedAdvantage(OP, settings, names_stay=True, gives_prior=True)
        if args.riskpo_head:
            use_riskpo_head(
                self,
                backend=args.riskpo_backend,
                memory_mib=args.riskpo_memory_mib,
                tail_eps=args.riskpo_tail_eps,
            )

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        per_function = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scored = per_function, [answer_key(tokens) for tokens in completion_ids_list]
        return per_function

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        column, questions = self.args.riskpo_question_column, []
        prior: list[float] | None = None
        if self.model.training:  # before a rollout function can add columns of its own to `inputs`
            questions = [question_key(row, column) for row in inputs]
            if self.args.riskpo_prior_column is not None:
                prior = [prior_of(row, self.args.riskpo_prior_column) for row in inputs]
        output = super()._generate_and_score_completions(inputs)
        per_function, answers = self._scored
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(1)
        rewards[per_function.isnan().all(1)] = float("nan")  # as TRL: a row nobody could score
        if self.model.training:
            advantages = self._advantages(rewards, questions, answers, prior)
        else:
            advantages = torch.zeros_like(rewards)
        logged = self._logs["advantages"]  # TRL has put its own there
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())
        first = self.accelerator.process_index * len(inputs)
        output["advantages"] = advantages[first : first + len(inputs)].to(self.accelerator.device)
        return output

    def _advantages(
        self,
        rewards: torch.Tensor,
        questions: list[str],
        answers: list[str],
        prior: list[float] | None = None,
    ) -> torch.Tensor:
        """Advantages [N] of all ranks' rows from gathered rewards [N]; moves the tracker."""
        keys, sampled = gather_object(questions), gather_object(answers)
        ids = question_ids(keys, self.num_generations)
        advantages, stats = self.riskpo(
            rewards, ids, sampled, None if prior is None else gather_object(prior)
        )
        stats.pop("ragged_questions")  # question_ids has refused them
        self._check_ranks(advantages)
        for name, value in stats.items():
            self._log(f"riskpo/{name}", value)
        return advantages

    def _check_ranks(self, advantages: torch.Tensor) -> None:
        state = json.dumps([self._riskpo_state(), advantages.tolist()])
        digests = gather_object([hashlib.sha256(state.encode()).hexdigest()])
        if len(set(digests)) > 1:
            raise RuntimeError(
                f"{OP}: got {len(set(digests))} different states on {len(digests)} ranks; expected "
                "the same tracker and advantages everywhere. Start all ranks with the same "
                "RiskPOConfig and checkpoint."
            )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        logprob, entropy = self._score(model, inputs)
        old = inputs.get("old_per_token_logps")
        old = logprob.detach() if old is None else old
        weight = inputs.get("importance_sampling_ratio")
        if weight is not None and weight.shape != mask.shape:
            weight = weight[:, 0]  # [B, 1], one per sequence
        loss, stats = clipped_surrogate(
            logprob,
            old,
            self._on_policy_advantages(inputs, logprob, old, mask),
            mask=mask,
            ratio=self.importance_sampling_level,
            correction=weight,
            ref_logprob=inputs.get("ref_per_token_logps"),
            kl_coef=self.beta,
            kl="k3-unbiased" if self.args.use_bias_correction_kl else "k3",
            entropy=entropy,
            aggregate=AGGREGATES[self.loss_type],
            denominator=self._denominator(inputs),
            backend=self.args.riskpo_backend,
            **self.args.surrogate(),
        )
        self._log_loss(stats, mask)
        if (sampled := inputs.get("sampling_per_token_logps")) is not None:
            # tokens without a log-prob of the sampler, to which TRL gives the weight 1
            missing = self.accelerator.reduce((sampled.isnan() & (mask != 0)).sum(), "sum")
            self._log("riskpo/sampler_missing", float(missing.item()))
        return self._with_entropy(loss, entropy, mask)

    def _log(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _on_policy_advantages(
        self, inputs: dict[str, Any], logprob: torch.Tensor, old: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """[B], or [B, C], 0 for the sequences that TRL's off_policy_mask_threshold leaves out."""
        advantage: torch.Tensor = inputs["advantages"]
        if self.off_policy_mask_threshold is None:
            return advantage
        keep = self.get_off_policy_mask(
            advantage.view(len(advantage), -1),
            logprob,
            inputs.get("sampling_per_token_logps", old),
            mask,
            self.off_policy_mask_threshold,
        )
        return advantage * keep.view(-1, *(1,) * (advantage.dim() - 1))

    def _score(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [B, C] of the completions."""
        images = (
            "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask",
            "spatial_shapes", "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids",
            "image_position_ids",
        )  # fmt: skip
        logprob, entropy, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            compute_entropy=True,
            **{name: inputs.get(name) for name in images},
        )
        return logprob, entropy

    def _accumulation(self) -> float:
        return self.current_gradient_accumulation_steps if self.model.training else 1.0

    def _denominator(self, inputs: dict[str, Any]) -> float | torch.Tensor:
        """This rank's share of the terms of one optimiser step; DDP takes the mean over ranks."""
        sequences = len(inputs["completion_ids"]) * self._accumulation()
        if self.loss_type in ("grpo", "sapo"):
            return sequences
        if self.loss_type == "dr_grpo":
            return sequences * self.max_completion_length
        tokens = inputs["num_items_in_batch"].clamp(min=1).float() / self.accelerator.num_processes
        if self.model.training:  # it counts the generation batch, which may be several steps'
            tokens = tokens * self._accumulation() / self.args.steps_per_generation
        return tokens.detach()

    def _with_entropy(
        self, loss: torch.Tensor, entropy: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """TRL's entropy bonus: the mean over this micro-batch's tokens."""
        if self.entropy_coef == 0:
            return loss
        mean = torch.where(mask != 0, entropy, 0.0).sum() / mask.sum().clamp(min=1)
        gathered = self.accelerator.gather(loss.detach() * self._accumulation())
        self._log("policy_loss", gathered.mean().item())
        return loss - self.entropy_coef * mean / self._accumulation()

    def _log_loss(self, stats: dict[str, torch.Tensor], mask: torch.Tensor) -> None:
        """Means over the tokens, or the non-empty sequences, of all ranks."""
        tokens = stats["tokens"].to(torch.float32)
        units = tokens if self.importance_sampling_level == "token" else (mask != 0).any(1).sum()
        of_units = {
            "clip_ratio/low_mean": stats["clip_low_fraction"],
            "clip_ratio/high_mean": stats["clip_high_fraction"],
            "clip_ratio/region_mean": stats["clip_low_fraction"] + stats["clip_high_fraction"],
            "ratio_mean": stats["ratio_mean"],
        }
        of_tokens = {name: stats[name] for name in ("entropy", "kl") if name in stats}
        sums = [x * units for x in of_units.values()] + [x * tokens for x in of_tokens.values()]
        totals = self.accelerator.reduce(torch.stack([*sums, units.float(), tokens]), "sum")
        *totals, all_units, all_tokens = totals.tolist()
        for name, total in zip((*of_units, *of_tokens), totals, strict=True):
            count = all_units if name in of_units else all_tokens
            self._log(name, total / max(count, 1.0))

    def _riskpo_state(self) -> dict[str, Any]:
        state = self.riskpo.state_dict()
        return {"generation_batches": state.pop("batches"), **state}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The state first: what pushes or rotates checkpoints then finds it in its place."""
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder = Path(self._get_output_dir(trial=trial)) / name
            write_json(folder / STATE_FILE, self._riskpo_state())
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._restore(Path(checkpoint))

    def _restore(self, folder: Path) -> None:
        """Rank 0 reads; a missing file and other settings are errors on every rank."""
        main = self.accelerator.is_main_process
        told = [read_state(folder) if main else None]
        broadcast_object_list(told)
        if told[0] is None:
            raise ValueError(missing_state(OP, folder))
        self.riskpo.load_state_dict({**told[0], "batches": told[0]["generation_batches"]})

"""verl's advantage estimator `riskpo`, and the callback that keeps its state with the checkpoints.

verl calls the estimator on its driver process with the whole batch, after rows were reordered for
balance and padding rows appended, and tells it neither step nor folder. The callback lives in the
same process and knows both.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.core_algos import register_adv_est
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

from riskpo.integrations.common import CountedAdvantage, read_state, write_state

OP = "riskpo in verl"
STATS_FILE = "riskpo_stats.jsonl"
CALLBACK = "trainer.checkpoint_callback_class=riskpo.integrations.verl.RiskPOCheckpoint"
PADDING = re.compile("pad[0-9a-f]{32}")  # uid of rows verl adds to fill up a batch


class Run:
    """The one RiskPO run of this process: its advantage, and where its state goes."""

    def __init__(self) -> None:
        self.advantage: CountedAdvantage | None = None
        self.settings: dict[str, Any] | None = None
        self.answers: int | None = None  # per question, rollout.n
        self.stats: Path | None = None
        self.saves = False

    def open(self, settings: dict[str, Any]) -> CountedAdvantage:
        """The advantage with these settings, made at the first call; ValueError if they change."""
        if self.advantage is None:
            given = dict(settings)
            saves = given.pop("checkpoint", True)
            if saves and not self.saves:
                raise ValueError(
                    f"{OP}: got no checkpoint callback; expected {CALLBACK}, without which a "
                    "resumed run forgets its tracked quantiles. Add that line, or "
                    "+algorithm.riskpo.checkpoint=false for a run that will not be resumed."
                )
            # verl's uid is drawn anew for every batch
            self.advantage = CountedAdvantage(OP, given, names_stay=False)
            self.settings = settings
        if settings != self.settings:
            raise ValueError(
                f"{OP}: got algorithm.riskpo={settings}; expected {self.settings} as at the first "
                "batch. One process runs one algorithm."
            )
        return self.advantage


run = Run()


@register_adv_est("riskpo")
def riskpo_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Sequence[Any] | None = None,
    config: Any = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RiskPO's advantage of every response, spread over its tokens (arXiv 2510.00911).

    token_level_rewards, response_mask  [B, T]; a response's reward is the sum of its row
    index    [B], verl's uid: rows with the same uid answer the same question, wherever they stand
    config   algorithm; its key `riskpo` holds preset, ragged, checkpoint and the overrides of
             riskpo_kernels.RiskPOAdvantage (+algorithm.riskpo.bundle_size=5)

    Returns (advantages, returns), both [B, T] float32: the response's value at its counted tokens.
    Row order does not matter, up to answers to one question with equal reward and equal mask, which
    share their advantages in order of place. Rows that verl adds as padding get 0 and are in no
    bundle. Several outputs per session (multi-turn agents that return more than one) are refused:
    the answers to a question would not be rollout.n. Every call moves the tracker once.

    ValueError without uids, on ragged questions (unless dropped), and as RiskPOAdvantage raises.
    """
    if index is None:
        raise ValueError(f"{OP}: got no uid; expected one per row, which verl's trainer passes.")
    advantage = run.open(_settings(config))
    scores = token_level_rewards.detach().double().sum(-1).cpu()
    live = response_mask.detach().cpu() != 0
    questions = [str(uid) for uid in index]
    rows = [row for row, uid in enumerate(questions) if not PADDING.fullmatch(uid)]
    keys = [(float(scores[row]), live[row].tolist()) for row in rows]
    kept = [questions[row] for row in rows]
    _check_answers(kept)
    value = torch.zeros(len(questions))
    value[rows], stats = advantage(scores[rows], kept, keys)
    _log(stats, advantage.batches)
    spread = torch.where(live, value[:, None], 0.0).to(token_level_rewards.device)
    return spread, spread.clone()


class RiskPOCheckpoint(CheckpointCallback):
    """Saves the tracker as riskpo_state.json in every global_step_N, and restores it on resuming.

    verl makes it from its whole config before it loads a checkpoint. Settings that would change the
    meaning of a bundle are refused here, before any weight loads: a KL penalty in the reward,
    groups filtered by their rewards, a batch whose questions do not fill bundles. Statistics of
    every batch are appended to riskpo_stats.jsonl in trainer.default_local_dir.

    Files are written by the driver process to trainer.default_local_dir; verl's copy of checkpoints
    to default_hdfs_dir does not include them. ValueError on a checkpoint without the state.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config=config)
        if config.algorithm.adv_estimator != "riskpo":
            raise ValueError(
                f"{OP}: got algorithm.adv_estimator={config.algorithm.adv_estimator}; expected "
                f"riskpo. Take out {CALLBACK} or set the estimator."
            )
        global run
        run = Run()
        run.saves = True
        run.answers = config.actor_rollout_ref.rollout.n
        run.stats = Path(config.trainer.default_local_dir) / STATS_FILE
        advantage = run.open(_settings(config.algorithm))
        _refuse(config, advantage)
        folder = _resumes_from(config.trainer)
        if folder is not None:
            advantage.load_state_dict(read_state(OP, folder))
            print(f"{OP}: tracker restored from {folder}, batch {advantage.batches}", flush=True)

    def on_save(
        self,
        trainer: Any,
        global_step: int,
        checkpoint_dir: str,
        async_save: bool = False,
        **others: Any,
    ) -> None:
        assert run.advantage is not None
        state = run.advantage.state_dict() | {"global_step": global_step}
        write_state(checkpoint_dir, state)


def _settings(algorithm: Any) -> dict[str, Any]:
    given = (algorithm.get("riskpo", None) if algorithm is not None else None) or {}
    return dict(
        OmegaConf.to_container(given, resolve=True) if OmegaConf.is_config(given) else given
    )


def _refuse(config: Any, advantage: CountedAdvantage) -> None:
    settings, answers = advantage.advantage.settings, config.actor_rollout_ref.rollout.n
    questions, bundle = config.data.train_batch_size, settings.bundle_size
    groups = config.algorithm.get("filter_groups", None) or {}
    expected = {}
    if config.algorithm.use_kl_in_reward:
        todo = "False: bundles add up verified rewards. Use actor.use_kl_loss"
        expected["algorithm.use_kl_in_reward=True"] = todo
    if groups.get("enable", False):
        todo = "False: questions without spread carry the tail's signal"
        expected["algorithm.filter_groups.enable=True"] = todo
    if settings.compares_responses and answers < 2:
        todo = "at least 2: compared with nothing, every advantage would be 0 for ever"
        expected[f"actor_rollout_ref.rollout.n={answers}"] = todo
    if questions < bundle or questions % bundle and settings.leftover == "error":
        todo = f"a multiple of bundle_size={bundle}, or +algorithm.riskpo.leftover=drop"
        expected[f"data.train_batch_size={questions}"] = todo
    if expected:
        came, todo = next(iter(expected.items()))
        raise ValueError(f"{OP}: got {came}; expected {todo}.")


def _resumes_from(trainer: Any) -> str | None:
    """The folder verl's v1 trainer will load: the same rule as its _load_checkpoint."""
    if trainer.resume_mode == "auto":
        return find_latest_ckpt_path(os.path.abspath(trainer.default_local_dir))
    if trainer.resume_mode == "resume_path":
        return os.path.abspath(trainer.resume_from_path)
    return None


def _check_answers(questions: Sequence[str]) -> None:
    most = max((questions.count(uid) for uid in set(questions)), default=0)
    if run.answers is not None and most > run.answers:
        raise ValueError(
            f"{OP}: got {most} rows for one question; expected at most rollout.n={run.answers}. "
            "Agents that return several outputs per session cannot be bundled."
        )


def _log(stats: dict[str, float], batch: int) -> None:
    if run.stats is not None:
        run.stats.parent.mkdir(parents=True, exist_ok=True)
        with open(run.stats, "a", encoding="utf-8") as file:
            file.write(json.dumps({"batch": batch} | stats) + "\n")

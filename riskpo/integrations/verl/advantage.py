"""verl's advantage estimator `riskpo`, and the callback that keeps its state with the checkpoints.

verl calls the estimator on its driver process with the whole batch, after it has reordered rows and
appended padding rows, and tells it neither step nor folder. The callback lives in the same process
and knows both.
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

from riskpo.integrations.common import CountedAdvantage

OP = "riskpo in verl"
STATS_FILE = "riskpo_stats.jsonl"
CALLBACK = "trainer.checkpoint_callback_class=riskpo.integrations.verl.RiskPOCheckpoint"
PADDING = re.compile("pad[0-9a-f]{32}")  # uid of rows verl adds to fill up a batch


class Run:
    """The RiskPO run of this process, made by the callback, or without one by the first batch."""

    def __init__(self, algorithm: Any) -> None:
        self.settings = _settings(algorithm)
        given = {k: v for k, v in self.settings.items() if k != "checkpoint"}
        # verl draws a question's uid anew for every batch
        self.advantage = CountedAdvantage(OP, given, names_stay=False)
        self.answers: int | None = None  # per question, rollout.n
        self.stats: Path | None = None


run: Run | None = None


@register_adv_est("riskpo")
def riskpo_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: Sequence[Any] | None = None,
    config: Any = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RiskPO's advantage of every response, at each of its tokens (arXiv 2510.00911).

    token_level_rewards, response_mask  [B, T]; a response's reward is the sum of its row
    index    [B], verl's uid: rows with the same uid answer the same question
    config   algorithm; its key `riskpo` holds preset, ragged, checkpoint and the overrides of
             riskpo_kernels.RiskPOAdvantage (+algorithm.riskpo.bundle_size=5)

    Returns (advantages, returns), equal, [B, T] float32. Every call moves the tracker once. Row
    order does not matter: answers to one question with equal reward and equal mask share their
    advantages in order of place. verl's padding rows get 0 and are in no bundle.

    ValueError without uids, for more rows per question than rollout.n (agents with several outputs
    per session), for ragged questions unless they are dropped, and as RiskPOAdvantage raises.
    """
    if index is None:
        raise ValueError(f"{OP}: got no uid; expected one per row, which verl's trainer passes.")
    mine = _run_of(config)
    questions = ["" if PADDING.fullmatch(str(uid)) else str(uid) for uid in index]
    most = max((questions.count(uid) for uid in {*questions} - {""}), default=0)
    if mine.answers is not None and most > mine.answers:
        raise ValueError(
            f"{OP}: got {most} rows for one question; expected at most rollout.n={mine.answers}. "
            "Agents that return several outputs per session cannot be bundled."
        )
    spread, stats = mine.advantage.over_tokens(token_level_rewards, response_mask, questions)
    if mine.stats is not None:
        mine.stats.parent.mkdir(parents=True, exist_ok=True)
        with open(mine.stats, "a", encoding="utf-8") as file:
            file.write(json.dumps({"batch": mine.advantage.batches} | stats) + "\n")
    return spread, spread.clone()


def _run_of(algorithm: Any) -> Run:
    """The run, made here if there is no callback; ValueError if its settings have changed."""
    global run
    settings = _settings(algorithm)
    if run is None and settings.get("checkpoint", True):
        raise ValueError(
            f"{OP}: got no checkpoint callback; expected {CALLBACK}, without which a resumed run "
            "forgets its tracked quantiles. Add that line, or +algorithm.riskpo.checkpoint=false "
            "for a run that will not be resumed."
        )
    run = run or Run(algorithm)
    if settings != run.settings:
        raise ValueError(
            f"{OP}: got algorithm.riskpo={settings}; expected {run.settings} as at the first "
            "batch. One process runs one algorithm."
        )
    return run


class RiskPOCheckpoint(CheckpointCallback):
    """Saves the tracker as riskpo_state.json in every global_step_N, and restores it on resuming.

    verl makes it before it loads a checkpoint or a weight. Settings that would change what a bundle
    adds up are refused here: a KL penalty in the reward, groups filtered by their rewards, a batch
    whose questions do not fill bundles. Statistics of every batch are appended to
    riskpo_stats.jsonl in trainer.default_local_dir.

    The driver process writes the files; verl's copy of checkpoints to default_hdfs_dir does not
    include them. ValueError for a checkpoint without the state.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config=config)
        global run
        run = Run(config.algorithm)
        _refuse(config, run.advantage.advantage.settings)
        run.answers = config.actor_rollout_ref.rollout.n
        run.stats = Path(config.trainer.default_local_dir) / STATS_FILE
        folder = _resumes_from(config.trainer)
        if folder is not None:
            run.advantage.load(folder)
            said = f"tracker restored from {folder}, batch {run.advantage.batches}"
            print(f"{OP}: {said}", flush=True)

    def on_save(
        self,
        trainer: Any,
        global_step: int,
        checkpoint_dir: str,
        async_save: bool = False,
        **others: Any,
    ) -> None:
        assert run is not None  # __init__ made it
        run.advantage.save(checkpoint_dir, global_step=global_step)


def _settings(algorithm: Any) -> dict[str, Any]:
    given = (algorithm.get("riskpo", None) if algorithm is not None else None) or {}
    return dict(
        OmegaConf.to_container(given, resolve=True) if OmegaConf.is_config(given) else given
    )


def _refuse(config: Any, s: Any) -> None:
    """ValueError for what does not go with bundles of the settings `s`."""
    algorithm, answers = config.algorithm, config.actor_rollout_ref.rollout.n
    questions, bundle = config.data.train_batch_size, s.bundle_size
    expected = {}
    if algorithm.adv_estimator != "riskpo":
        todo = f"riskpo. Take out {CALLBACK} or set the estimator"
        expected[f"algorithm.adv_estimator={algorithm.adv_estimator}"] = todo
    if algorithm.use_kl_in_reward:
        todo = "False: bundles add up verified rewards. Use actor.use_kl_loss"
        expected["algorithm.use_kl_in_reward=True"] = todo
    if (algorithm.get("filter_groups", None) or {}).get("enable", False):
        todo = "False: questions without spread carry the tail's signal"
        expected["algorithm.filter_groups.enable=True"] = todo
    if s.compares_responses and answers < 2:
        todo = "at least 2: compared with nothing, every advantage would be 0 for ever"
        expected[f"actor_rollout_ref.rollout.n={answers}"] = todo
    if questions < bundle or questions % bundle and s.leftover == "error":
        todo = f"a multiple of bundle_size={bundle}, or +algorithm.riskpo.leftover=drop"
        expected[f"data.train_batch_size={questions}"] = todo
    for came, todo in expected.items():
        raise ValueError(f"{OP}: got {came}; expected {todo}.")


def _resumes_from(trainer: Any) -> str | None:
    """The folder that verl's v1 trainer will load, by the rule of its _load_checkpoint."""
    if trainer.resume_mode == "auto":
        return find_latest_ckpt_path(os.path.abspath(trainer.default_local_dir))
    if trainer.resume_mode == "resume_path":
        return os.path.abspath(trainer.resume_from_path)
    return None

"""The launch scripts' overrides, composed by hydra on verl's own configuration."""

from __future__ import annotations

import importlib.util
import os
import stat
import subprocess
from pathlib import Path

import pytest

from riskpo.integrations.common import CountedAdvantage

hydra = pytest.importorskip("hydra", reason="hydra is not installed: run make test-hosts")

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "verl"
RUNS = {  # questions per step, updates per step, answers, response tokens, steps
    "dapo_math_r1_distill.sh": (480, 4, 10, 3072, 500),
    "math_gsm8k_qwen.sh": (1040, 2, 5, 1024, 200),
}


def overrides(script: Path, tmp_path: Path, preset: str) -> list[str]:
    """What the script passes to verl.trainer.main_ppo: a stand-in for python3 prints it."""
    stand_in = tmp_path / "python3"
    stand_in.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": "/data", "PRESET": preset}
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[:2] == ["-m", "verl.trainer.main_ppo"]
    return words[2:]


@pytest.mark.parametrize("preset", ["paper", "matched"])
@pytest.mark.parametrize("name", RUNS)
def test_every_override_is_a_key_of_verls_configuration(name, preset, tmp_path):
    spec = importlib.util.find_spec("verl")  # found, not imported: this needs no ray
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("verl is not installed: run make test-hosts")
    folder = Path(spec.submodule_search_locations[0]) / "trainer" / "config"
    with hydra.initialize_config_dir(str(folder), version_base=None):
        config = hydra.compose("ppo_trainer", overrides(FOLDER / name, tmp_path, preset))
    questions, updates, answers, tokens, steps = RUNS[name]
    assert config.algorithm.adv_estimator == "riskpo"
    assert config.algorithm.riskpo.preset == preset
    given = {k: v for k, v in config.algorithm.riskpo.items() if k != "preset"}
    advantage = CountedAdvantage("verl", {"preset": preset, **given}, names_stay=False).advantage
    assert advantage.settings.bundling == ("matched" if preset == "matched" else "random")
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == "riskpo"
    assert config.trainer.checkpoint_callback_class == "riskpo.integrations.verl.RiskPOCheckpoint"
    assert config.data.train_batch_size == questions
    assert questions % config.algorithm.riskpo.bundle_size == 0
    assert questions // config.actor_rollout_ref.actor.ppo_mini_batch_size == updates
    assert config.actor_rollout_ref.rollout.n == answers
    assert config.data.max_response_length == tokens
    assert config.trainer.total_training_steps == steps

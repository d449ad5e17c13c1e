"""riskpo against the installed verl: registry, estimator, checkpoint callback.

verl's registries, config classes and callback are the real ones; no Ray cluster, model or GPU is
involved.
"""

from __future__ import annotations

import json
import subprocess
import sys
import uuid

import numpy as np
import pytest
import torch

from riskpo_kernels import reference

core = pytest.importorskip(
    "verl.trainer.ppo.core_algos", reason="verl does not import here: run make test-hosts"
)
from omegaconf import OmegaConf  # noqa: E402
from verl.trainer.ppo.checkpoint_callback import build_checkpoint_callback  # noqa: E402

from riskpo.integrations import verl as host  # noqa: E402
from riskpo.integrations.verl import advantage as verl_advantage  # noqa: E402
from riskpo.integrations.verl import reward as verl_reward  # noqa: E402

QUESTIONS, ANSWERS, BUNDLE, T = 6, 4, 3, 12
SETTINGS = {"bundle_size": BUNDLE, "seed": 3}


@pytest.fixture(autouse=True)
def fresh_run(monkeypatch):
    monkeypatch.setattr(verl_advantage, "run", None)


def algorithm(**settings):
    return OmegaConf.create({"adv_estimator": "riskpo", "riskpo": SETTINGS | settings})


def batch(seed: int = 0):
    """Rewards at the last token, answers of distinct lengths, in an order without structure."""
    g = torch.Generator().manual_seed(seed)
    uid = np.array([f"q{i}" for i in range(QUESTIONS) for _ in range(ANSWERS)], dtype=object)
    lengths = torch.cat(
        [torch.randperm(T - 1, generator=g)[:ANSWERS] + 1 for _ in range(QUESTIONS)]
    )
    rewards = torch.randint(0, 2, (len(uid),), generator=g).float()
    mask = (torch.arange(T) < lengths[:, None]).long()
    token_rewards = torch.zeros(len(uid), T)
    token_rewards[torch.arange(len(uid)), lengths - 1] = rewards
    order = torch.randperm(len(uid), generator=g)
    return token_rewards[order], mask[order], uid[order.numpy()]


def estimate(rows, config=None, **settings):
    config = config or algorithm(checkpoint=False, **settings)
    return core.get_adv_estimator_fn("riskpo")(
        token_level_rewards=rows[0], response_mask=rows[1], index=rows[2], config=config
    )


def test_verl_loads_the_plugin_by_itself_and_says_so(tmp_path):
    code = (
        "import verl\n"
        "from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn\n"
        "print(get_adv_estimator_fn('riskpo').__module__, get_policy_loss_fn('riskpo').__module__)"
    )
    command = [sys.executable, "-c", code]  # elsewhere: a checkout's stale egg-info would hide it
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "riskpo.integrations.verl.advantage",
        "riskpo.integrations.verl.loss",
    ]
    assert done.stderr.count("estimator riskpo, policy losses riskpo, riskpo_token") == 1


@pytest.mark.parametrize("name", ["riskpo", "riskpo_token", "riskpo_cispo", "riskpo_sapo"])
def test_the_self_check_notices_a_taken_name(name, monkeypatch):
    host.check_registered()
    assert name in host.banner()
    monkeypatch.setitem(core.POLICY_LOSS_REGISTRY, name, lambda: None)
    with pytest.raises(RuntimeError, match="VERL_USE_EXTERNAL_PLUGINS"):
        host.check_registered()


def test_advantages_are_the_references():
    rewards, mask, uid = rows = batch()
    advantages, returns = estimate(rows)
    draw = [0] * len(uid)
    for question in set(uid):
        at = [i for i in range(len(uid)) if uid[i] == question]
        keys = {i: (rewards[i].sum().item(), mask[i].tolist()) for i in at}
        for number, i in enumerate(sorted(at, key=keys.get)):
            draw[i] = number
    expected, _ = reference.RiskPOAdvantage("paper", **SETTINGS)(
        rewards.sum(-1), list(uid), step=0, draw=draw
    )
    torch.testing.assert_close(advantages, expected[:, None] * mask)
    assert torch.equal(advantages, returns) and advantages.any()


def test_permuted_rows_give_permuted_advantages(monkeypatch):
    rewards, mask, uid = batch()
    expected, _ = estimate((rewards, mask, uid))
    order = torch.randperm(len(uid), generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr(verl_advantage, "run", None)
    got, _ = estimate((rewards[order], mask[order], uid[order.numpy()]))
    assert torch.equal(got, expected[order])


def test_rows_that_verl_appends_as_padding_are_in_no_bundle(monkeypatch):
    rewards, mask, uid = batch()
    expected, _ = estimate((rewards, mask, uid))
    monkeypatch.setattr(verl_advantage, "run", None)
    pad = np.array([f"pad{uuid.uuid4().hex}"] * 2, dtype=object)
    more = torch.zeros(2, T)
    got, _ = estimate((torch.cat([rewards, more]), torch.cat([mask, more.long()]),
                       np.concatenate([uid, pad])))  # fmt: skip
    assert torch.equal(got[:-2], expected) and not got[-2:].any()


def test_ragged_questions_are_refused_or_left_out_whole(monkeypatch):
    rewards, mask, uid = (x[1:] for x in batch())
    with pytest.raises(ValueError, match="1 of 6 questions with fewer answers than 4"):
        estimate((rewards, mask, uid))
    monkeypatch.setattr(verl_advantage, "run", None)
    short = min(set(uid), key=list(uid).count)
    with pytest.warns(UserWarning, match="do not fill bundles"):
        got, _ = estimate((rewards, mask, uid), ragged="drop", leftover="drop")
    assert not got[uid == short].any() and got.any()


@pytest.mark.parametrize(
    "change, message",
    [({"index": None}, "no uid"), ({"config": algorithm(checkpoint=True)}, "checkpoint callback")],
)
def test_what_is_missing_is_named(change, message):
    rewards, mask, uid = batch()
    given = {"index": uid, "config": algorithm(checkpoint=False)} | change
    with pytest.raises(ValueError, match=message):
        verl_advantage.riskpo_advantage(rewards, mask, **given)


def whole_config(folder, **changes):
    config = OmegaConf.create(
        {
            "algorithm": {"adv_estimator": "riskpo", "use_kl_in_reward": False, "riskpo": SETTINGS},
            "actor_rollout_ref": {"rollout": {"n": ANSWERS}},
            "data": {"train_batch_size": QUESTIONS},
            "trainer": {
                "checkpoint_callback_class": host.CALLBACK.split("=")[1],
                "default_local_dir": str(folder),
                "resume_mode": "auto",
                "resume_from_path": None,
            },
        }
    )
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    return config


def save(config, callback, folder, step):
    where = folder / f"global_step_{step}"
    where.mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
    callback.on_save(trainer=None, global_step=step, checkpoint_dir=str(where), async_save=False)
    return where


def test_a_resumed_run_continues_the_uninterrupted_one(tmp_path):
    config = whole_config(tmp_path)
    callback = build_checkpoint_callback(config)
    straight = []
    for seed in range(4):
        straight.append(estimate(batch(seed), config.algorithm)[0])
        if seed == 1:
            where = save(config, callback, tmp_path, step=10)
    state = json.loads((where / "riskpo_state.json").read_text())
    assert (state["batches"], state["global_step"]) == (2, 10)
    build_checkpoint_callback(config)  # a new process makes a new callback, and so a new run
    resumed = [estimate(batch(seed), config.algorithm)[0] for seed in (2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(resumed, straight[2:], strict=True))
    lines = (tmp_path / "riskpo_stats.jsonl").read_text().splitlines()
    assert [json.loads(line)["batch"] for line in lines] == [1, 2, 3, 4, 3, 4]
    named = whole_config(tmp_path, trainer__resume_mode="resume_path")
    named.trainer.resume_from_path = str(where)
    build_checkpoint_callback(named)
    assert torch.equal(estimate(batch(2), config.algorithm)[0], straight[2])


def test_a_checkpoint_without_the_state_or_with_other_settings_is_refused(tmp_path):
    config = whole_config(tmp_path)
    callback = build_checkpoint_callback(config)
    estimate(batch(), config.algorithm)
    where = save(config, callback, tmp_path, step=1)
    changed = whole_config(tmp_path, algorithm__riskpo__bundle_size=2)
    with pytest.raises(ValueError, match="expected the settings of the saved run"):
        build_checkpoint_callback(changed)
    (where / "riskpo_state.json").unlink()
    with pytest.raises(ValueError, match="checkpoint without riskpo_state.json"):
        build_checkpoint_callback(config)
    build_checkpoint_callback(whole_config(tmp_path, trainer__resume_mode="disable"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"algorithm__use_kl_in_reward": True}, "use_kl_in_reward"),
        ({"algorithm__filter_groups": {"enable": True}}, "filter_groups"),
        ({"data__train_batch_size": 7}, "multiple of bundle_size=3"),
        (
            {"actor_rollout_ref__rollout__n": 1, "algorithm__riskpo__baseline": "leave-one-out"},
            "rollout.n=1; expected at least 2",
        ),
        ({"algorithm__adv_estimator": "grpo"}, "expected riskpo"),
        ({"algorithm__riskpo__bundle_sise": 3}, "bundle_size"),
    ],
)
def test_settings_that_spoil_a_bundle_are_refused_before_training(tmp_path, change, message):
    config = whole_config(tmp_path)
    for key, value in change.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
    with pytest.raises(ValueError, match=message):
        build_checkpoint_callback(config)


def test_more_rows_per_question_than_samples_are_refused(tmp_path):
    build_checkpoint_callback(config := whole_config(tmp_path))
    config.actor_rollout_ref.rollout.n = 2
    build_checkpoint_callback(config)
    with pytest.raises(ValueError, match="expected at most rollout.n=2"):
        estimate(batch(), config.algorithm)


def test_rewards_of_minus_one_become_zero():
    right, wrong = "Answer: 34", "Answer: 35"
    scores = [verl_reward.zero_one("math_dapo", text, "34") for text in (right, wrong)]
    assert [s["score"] for s in scores] == [1.0, 0.0]
    assert [s["verl_score"] for s in scores] == [1.0, -1.0]

"""Side by side: what is run, what is kept, and every number of the page against one by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import riskpo.run
from riskpo.cli import main
from riskpo.compare.launch import (
    configured,
    finished,
    parse_seeds,
    parse_system,
    read_config,
    train_run,
    warm,
)
from riskpo.compare.numbers import (
    by_step,
    entropy_at_equal_reward,
    last_step,
    load,
    over_seeds,
    paired,
    summaries,
    summary,
)
from riskpo.compare.page import verdict, write_page
from riskpo.config import TrainConfig
from riskpo.files import run_dir
from riskpo.metrics.intervals import Interval

SMALL = TrainConfig(
    data="embedded:mixed", steps=2, questions_per_step=5, responses_per_question=2,
    updates_per_step=1, eval_questions=4, eval_samples=2, eval_every_steps=1, save_every_steps=1,
)  # fmt: skip


def fake_run(out, system, seed, rewards, *, responses=10, passes=(0.2, 0.5)):
    """A log of len(rewards) steps with an evaluation before and after."""
    folder = run_dir(out, system, seed)
    folder.mkdir(parents=True)
    lines = [{"kind": "eval", "step": 0, "pass@1": passes[0], "avg@2": passes[0], "time_s": 1.0}]
    for i, reward in enumerate(rewards):
        numbers = {"reward_mean": reward, "cov_mean": float(i), "sampled_responses": responses}
        lines.append({"kind": "step", "step": i + 1, **numbers, "time_s": 1.0})
    lines.append({**lines[0], "step": len(rewards), "pass@1": passes[1]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


# What is asked for ---------------------------------------------------------------------------


def test_systems_and_seeds(tmp_path):
    name = "riskpo-loo+omega=0+clip_low=0.01+scale=none"
    config = configured(SMALL, name, parse_system(name, {}), 3, tmp_path)
    assert (config.algorithm, config.run_dir) == ("riskpo-loo", str(tmp_path / name / "seed-3"))
    assert (config.omega, config.clip_low, config.scale, config.seed) == (0.0, 0.01, "none", 3)
    assert config.model == str(tmp_path / "start" / "seed-3")
    named = {"ours": {"algorithm": "riskpo-paper", "beta": 0.9}}
    settings = {"algorithm": "riskpo-paper", "beta": 0.9, "alpha": 0.1}
    assert parse_system("ours+alpha=0.1", named) == settings
    assert named == {"ours": {"algorithm": "riskpo-paper", "beta": 0.9}}
    assert parse_seeds("0-3") == [0, 1, 2, 3] and parse_seeds("4,0-1") == [4, 0, 1]


def test_settings_come_from_a_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        'steps = 7\n[margins]\nmvar = 0.1\n[systems.low]\nalgorithm = "grpo"\nclip_low = 0.1\n'
    )
    base, named, margins = read_config(str(path))
    assert base.steps == 7 and named == {"low": {"algorithm": "grpo", "clip_low": 0.1}}
    assert margins == {"mvar": 0.1}
    path.write_text("[margins]\nmvar = -1\n")
    with pytest.raises(ValueError, match="mvar = -1 under .margins.; expected a number above 0"):
        read_config(str(path))
    assert read_config(None)[0].data == "embedded:mixed"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--algorithms grpoo", "Did you mean 'grpo'"),
        ("--algorithms grpo+omega", "expected setting=value"),
        ("--algorithms riskpo-loo+omga=1", "Did you mean 'omega'"),
        ("--algorithms grpo+omega=1", "its advantage has no bundles"),
        ("--algorithms grpo --seeds 1,1", "expected different numbers"),
        ("--algorithms grpo --seeds x", "expected different numbers"),
        ("--algorithms grpo --against dapo", "Add it to --algorithms"),
        ("--algorithms grpo --page-only", "there is no"),
    ],
)
def test_misuse_is_one_line(arguments, message, tmp_path, capsys):
    assert main(["compare", *arguments.split(), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "low, high, word",
    [
        (0.03, 0.05, "higher by more than the margin"),
        (0.01, 0.05, "higher"),
        (0.005, 0.015, "no difference that matters"),
        (-0.01, 0.01, "no difference that matters"),
        (-0.01, 0.03, "undecided"),
        (-0.05, -0.01, "lower"),
        (-0.05, -0.03, "lower by more than the margin"),
    ],
)
def test_a_verdict_is_the_place_of_the_interval(low, high, word):
    assert verdict(Interval((low + high) / 2, low, high, 5), 0.02) == word
    assert verdict(Interval(low, low, low, 1), 0.02) == "undecided"


# What is run ---------------------------------------------------------------------------------


def test_runs_share_a_start_and_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(riskpo.run, "warm_start", lambda *args, **kwargs: (0, 0.0))
    warm(SMALL, 0, tmp_path)
    assert warm(SMALL, 0, tmp_path) == "kept"
    with pytest.raises(ValueError, match="made with other settings"):
        warm(replace(SMALL, temperature=0.5), 0, tmp_path)
    logs = {}
    for name in ("grpo", "riskpo-paper"):
        config = configured(SMALL, name, parse_system(name, {}), 0, tmp_path)
        assert not finished(config)
        train_run(config)
        assert finished(config) and train_run(config) == "kept"
        logs[name] = (run_dir(tmp_path, name, 0) / "metrics.jsonl").read_bytes()
        with pytest.raises(ValueError, match="started with other settings"):
            finished(replace(config, learning_rate=0.5))
    first = {name: json.loads(log.splitlines()[0]) for name, log in logs.items()}
    for held in first.values():
        held.pop("time_s")
    assert first["grpo"] == first["riskpo-paper"]  # the same weights and questions
    grpo = configured(SMALL, "grpo", parse_system("grpo", {}), 0, tmp_path)
    assert finished(replace(grpo, steps=1))  # a longer run serves
    assert not finished(replace(grpo, steps=3))
    train_run(replace(grpo, steps=3))
    resumed = (run_dir(tmp_path, "grpo", 0) / "metrics.jsonl").read_bytes()
    assert resumed.startswith(logs["grpo"]) and len(resumed) > len(logs["grpo"])


def test_the_command_from_end_to_end(tmp_path, capfd):
    """Two processes, a real if short warm start, one page."""
    toml = tmp_path / "c.toml"
    toml.write_text(
        'data = "embedded"\nsteps = 1\nquestions_per_step = 5\nresponses_per_question = 2\n'
        "eval_questions = 3\neval_samples = 2\nsave_every_steps = 1\n"
    )
    model = tmp_path / "model"
    from tests.toy import save_arithmetic

    save_arithmetic(tmp_path)
    toml.write_text(toml.read_text() + f'model = "{model}"\n')
    given = f"compare {toml} --algorithms grpo,dapo --seeds 0 --jobs 2 --out {tmp_path / 'out'}"
    assert main(given.split()) == 0
    printed = capfd.readouterr().out
    assert "[2/2]" in printed and "compare.png" in printed
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "| dapo |" in (tmp_path / "out" / "compare.md").read_text()
    assert main(given.split()) == 0
    assert capfd.readouterr().out.count(": kept") == 2


# What is said --------------------------------------------------------------------------------


def test_numbers_by_hand(tmp_path):
    for seed, (ours, theirs) in enumerate([(0.5, 0.3), (0.6, 0.5), (0.4, 0.1)]):
        fake_run(tmp_path, "a", seed, [0.0] * 18 + [ours - 0.1, ours + 0.1])
        fake_run(tmp_path, "b", seed, [theirs] * 20, passes=(0.2, 0.3))
    runs = load(tmp_path, ["a", "b"], [0, 1, 2])
    rows = summaries(runs, lambda run: 20)
    found = rows.loc["a", 0]
    assert found["reward_mean"] == pytest.approx(0.5)  # the last tenth
    assert found["cov_mean"] == pytest.approx(np.arange(20).mean())  # all of them
    assert found["eval pass@1"] == 0.5 and found["gain pass@1"] == pytest.approx(0.3)
    assert not any("time" in name or "step" in name for name in found.index)
    mean = over_seeds(rows)["a"]["reward_mean"]
    half = 4.303 * np.std([0.5, 0.6, 0.4], ddof=1) / np.sqrt(3)
    assert (mean.value, mean.high) == pytest.approx((0.5, 0.5 + half))
    change = over_seeds(paired(rows, "b"))["a"]["reward_mean"]
    half = 4.303 * np.std([0.2, 0.1, 0.3], ddof=1) / np.sqrt(3)
    assert (change.value, change.low) == pytest.approx((0.2, 0.2 - half))
    assert list(over_seeds(paired(rows, "b"))) == ["a"]


def test_equal_responses_and_common_steps(tmp_path):
    fake_run(tmp_path, "plain", 0, [0.1] * 30)
    fake_run(tmp_path, "resampling", 0, np.linspace(0, 1, 20).tolist(), responses=25)
    runs = load(tmp_path, ["plain", "resampling"], [0])
    assert {run.index[-1] for run in runs.values()} == {20}
    assert last_step(runs["resampling", 0], 200.0) == 8
    assert last_step(runs["resampling", 0], 24.0) == 0
    write_page(tmp_path, "p", ["plain", "resampling"], [0], "plain")
    content = json.loads((tmp_path / "p.json").read_text())
    assert content["about"]["responses"] == 200.0 and content["about"]["steps"] == 20
    at = {k: v["resampling"]["reward_mean"]["value"] for k, v in content["over_seeds"].items()}
    assert at["steps"] == pytest.approx(18.5 / 19) and at["responses"] == pytest.approx(7 / 19)
    text = (tmp_path / "p.md").read_text()
    assert "At equal responses (200 a run)" in text and "resampling 500" in text


def test_held_out_numbers_between_two_evaluations():
    run = by_step([], [{"step": 0, "pass@1": 0.2}, {"step": 50, "pass@1": 0.4}])
    at = {step: summary(run, step)["eval pass@1"] for step in (0, 40, 50, 60)}
    assert at == pytest.approx({0: 0.2, 40: 0.36, 50: 0.4, 60: 0.4})
    assert summary(by_step([{"step": 1, "mvar": 2.0}]), 3).to_dict() == {"mvar": 2.0}


def test_a_difference_is_bold_where_it_excludes_zero(tmp_path):
    for seed in range(3):
        fake_run(tmp_path, "a", seed, [0.5 + 0.01 * seed])
        fake_run(tmp_path, "b", seed, [0.3])
        fake_run(tmp_path, "c", seed, [0.3 + 0.1 * (seed - 1)])
    write_page(tmp_path, "p", ["b", "a", "c"], [0, 1, 2], "b", {"reward_mean": 0.1})
    text = (tmp_path / "p.md").read_text()
    assert "## Primary outcomes, minus b" in text and "| reward_mean (±0.1) |" in text
    assert "| a | higher by more than the margin: **+0.210" in text
    assert "| c | undecided: +0.000 [-0.248" in text
    with pytest.raises(ValueError, match="a margin for 'reward'; expected one of .*reward_mean"):
        write_page(tmp_path, "p", ["b", "a"], [0, 1, 2], "b", {"reward": 0.1})
    assert "**+0.210 [+0.185, +0.235]**" in text
    assert "+0.000 [-0.248, +0.248]" in text and "**+0.000" not in text


def test_entropy_at_equal_reward():
    def run(rewards, entropies):
        pairs = enumerate(zip(rewards, entropies, strict=True), 1)
        rows = [{"step": i, "reward_mean": r, "sampled_entropy": h} for i, (r, h) in pairs]
        return by_step(rows)

    fast = run([0.1, 0.3, 0.5, 0.7], [1.0, 0.8, 0.6, 0.4])
    slow = run([0.1, 0.2, 0.3, 0.3], [1.0, 0.95, 0.9, 0.85])
    assert entropy_at_equal_reward(slow, fast) == pytest.approx(0.9 - 0.8)  # both first reach 0.3
    assert np.isnan(entropy_at_equal_reward(slow, by_step([{"step": 1, "reward_mean": 0.1}])))


def test_the_share_of_steps_clipped_by_norm(tmp_path):
    """A third of all steps is above the run's own bound, and all of the last tenth."""
    norms = [0.5] * 20 + [2.0] * 10
    steps = [{"step": i + 1, "grad_norm": n} for i, n in enumerate(norms)]
    found = summary(by_step(steps, [], 1.0), 30)
    assert found["norm_clipped_fraction"] == pytest.approx(1 / 3) and found["grad_norm"] == 2.0
    assert summary(by_step(steps, [], 2.0), 30)["norm_clipped_fraction"] == 0.0  # not above it
    assert "norm_clipped_fraction" not in summary(by_step(steps), 30)
    fake_run(tmp_path, "a", 0, [0.1] * 3)
    (run_dir(tmp_path, "a", 0) / "config.toml").write_text("max_grad_norm = 0.25\n")
    assert load(tmp_path, ["a"], [0])["a", 0]["max_grad_norm"].tolist() == [0.25] * 4


@pytest.mark.parametrize("cards, named", [([], "cores, Python"), (["A", "A"], "cores, A, Python")])
def test_the_page_names_the_machine_s_gpus(cards, named, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(cards))
    monkeypatch.setattr("torch.cuda.get_device_name", cards.__getitem__)
    fake_run(tmp_path, "a", 0, [0.1])
    write_page(tmp_path, "p", ["a"], [0], "a")
    machine = json.loads((tmp_path / "p.json").read_text())["about"]["machine"]
    assert named in machine and machine in (tmp_path / "p.md").read_text()


def test_a_comparison_without_held_out_questions_has_its_page(tmp_path):
    for name in ("a", "b"):
        fake_run(tmp_path, name, 0, [0.1, 0.2])
        log = run_dir(tmp_path, name, 0) / "metrics.jsonl"
        steps = [x for x in log.read_text().splitlines() if '"eval"' not in x]
        log.write_text("\n".join(steps) + "\n")
    for path in write_page(tmp_path, "p", ["a", "b"], [0], "a"):
        assert path.stat().st_size > 0
    assert (tmp_path / "p.md").read_text().count("No held-out number of this kind.") == 5

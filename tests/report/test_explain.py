"""Each diagnosis on a log made for it, its absence on a healthy one, and one real run."""

from __future__ import annotations

import json

import pytest

import riskpo.run
from riskpo.cli import main
from riskpo.config import SamplerConfig, TrainConfig, resolve, to_toml
from riskpo.report.explain import explain
from riskpo.train import train

HEALTHY = {
    "reward_mean": 0.4,
    "all_wrong_fraction": 0.2,
    "all_right_fraction": 0.1,
    "tied_bundle_fraction": 0.1,
    "zero_advantage_fraction": 0.05,
    "advantage_min": -2.0,
    "advantage_max": 1.5,
    "advantage_mean": 0.0,
    "q_alpha": 1.0,
    "q_beta": 3.0,
    "q_alpha_tracked": 1.0,
    "q_beta_tracked": 3.0,
    "batch_q_alpha": 1.1,
    "batch_q_beta": 3.1,
    "loss": 0.001,
    "grad_norm": 0.5,
    "clip_fraction": 0.1,
    "clip_low_fraction": 0.06,
    "clip_high_fraction": 0.04,
    "ratio_mean": 1.0,
    "entropy": 0.5,
    "sampled_entropy": 0.5,
    "sampler_kl": 1e-9,
    "truncated_fraction": 0.0,
    "skipped_updates": 0.0,
    "sampled_questions": 40.0,
    "outcome_right": 100.0,
    "outcome_wrong": 200.0,
    "outcome_no_answer": 0.0,
    "outcome_timeout": 0.0,
    "outcome_crash": 0.0,
    "outcome_unparsable_gold": 0.0,
}


def write(folder, records, evals=(), **settings):
    config, _ = resolve(TrainConfig(data="embedded:mixed", **settings))
    (folder / "config.toml").write_text(to_toml(config))
    lines = [{"kind": "step", "step": i + 1, **r} for i, r in enumerate(records)]
    lines += [{"kind": "eval", "step": i, **r} for i, r in enumerate(evals)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return explain(folder)


def constant(**changes):
    return [HEALTHY | changes] * 20


def falling(name, first, last, steps=20):
    return [HEALTHY | {name: first + (last - first) * i / (steps - 1)} for i in range(steps)]


def test_a_healthy_run_has_nothing_notable(tmp_path):
    findings = write(tmp_path, constant(), [{"avg@8": 0.3}, {"avg@8": 0.45}], updates_per_step=2)
    assert not [f.text for f in findings if f.notable]
    text = " ".join(f.text for f in findings)
    assert "30% of the groups are all-equal" in text and "10.0% of the ratios" in text
    assert "avg@8 went from 0.300 to 0.450" in text and "None was skipped" in text
    assert "6000 verdicts; no timeout" in text


CASES = {
    "all-equal groups": (
        constant(all_wrong_fraction=0.7, all_right_fraction=0.1),
        "70% had only wrong responses and 10% only right ones: 80% of the groups are all-equal",
    ),
    "no advantage": (constant(zero_advantage_fraction=0.9), "90% of the responses"),
    "natural baseline": (
        constant(advantage_max=0.0, advantage_min=-3.0),
        "Every advantage lay in [-3.00, 0]: responses are pushed down",
    ),
    "upper quantile at zero": (constant(q_beta=0.0), "right answers count for nothing"),
    "no gradient": (constant(loss=0.0, grad_norm=0.0), "nothing is learned"),
    "clipped away": (constant(clip_fraction=0.6), "60.0% of the ratios were clipped"),
    "collapsed entropy": (
        falling("sampled_entropy", 0.5, 0.01),
        "from 0.461 to 0.049 nats: it has collapsed",
    ),
    "verifier timeouts": (constant(outcome_timeout=30.0), "600 timeout: 9.1% of the rewards"),
    "verifier crashes": (constant(outcome_crash=30.0), "600 crash: 9.1% of the rewards"),
    "no answers": (constant(outcome_no_answer=300.0), "50% of the responses held no answer"),
    "truncation": (constant(truncated_fraction=0.5), "50.0% of the late responses were cut at"),
    "skipped updates": (falling("skipped_updates", 0.0, 7.0), "7 were skipped"),
    "falling reward": (falling("reward_mean", 0.4, 0.1), "0.376 early, 0.124 late."),
    "empty steps": (
        [{"reward_mean": 0.4, "sampled_questions": 400.0}] * 3 + constant(),
        "3 steps kept no question",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_diagnosis(name, tmp_path):
    records, expected = CASES[name]
    notable = [f.text for f in write(tmp_path, records, updates_per_step=2) if f.notable]
    assert any(expected in text for text in notable), notable
    assert len(notable) == 1 or name == "empty steps", notable


def test_sampler_mismatch(tmp_path):
    """With several updates it is read where the records hold it beside the ratios' own maximum:
    else it may be what the updates changed."""
    records = constant(sampler_kl=0.02, clip_fraction=0.0)
    text = [f.text for f in write(tmp_path, records, updates_per_step=1) if f.notable]
    assert text == ["Sampler and trainer differ by a KL of 2.0e-02 nats per token: they are not "
                    "the same policy."]  # fmt: skip
    assert not any("KL" in f.text for f in write(tmp_path, records, updates_per_step=2))
    records[3] = records[3] | {"sampler_ratio_max": 3.25}
    text = [f.text for f in write(tmp_path, records, updates_per_step=2) if f.notable]
    assert text == ["Sampler and trainer differ by a KL of 2.0e-02 nats per token, and by at most "
                    "a factor of 3.25 in a token: they are not the same policy."]  # fmt: skip
    settings = SamplerConfig(correction="tis", level="sequence")
    found = write(tmp_path, constant(sampler_ratio_max=1.00001), sampler=settings)
    (text,) = [f.text for f in found if "KL" in f.text]
    assert text.endswith("at most a factor of 1.00001 in a response: rounding.")


@pytest.mark.parametrize(
    "settings, numbers, sentences",
    [
        (
            {"correction": "tis"},
            {"sampler_ess": 0.97, "sampler_truncated": 0.012},
            ["  The TIS weights leave 97.0% of the sample (effective sample size).",
             "  1.2% of the tokens had a weight above sampler.cap = 2 (the largest 3.5) and were "
             "truncated to it."],
        ),
        (
            {"correction": "mis", "level": "sequence", "cap": 1.5},
            {"sampler_ess": 0.31, "sampler_masked": 0.4},
            ["! The MIS weights leave 31.0% of the sample (effective sample size); the gradient "
             "rests on few of its terms.",
             "! 40.0% of the responses had a weight above sampler.cap = 1.5 (the largest 3.5) and "
             "were masked: they teach nothing."],
        ),
    ],
)  # fmt: skip
def test_what_the_sampler_correction_leaves(settings, numbers, sentences, tmp_path):
    records = constant(**numbers, sampler_ratio_max=3.5)
    records[0] = records[0] | {"sampler_ratio_max": 1.5}
    found = write(tmp_path, records, updates_per_step=2, sampler=SamplerConfig(**settings))
    found = [f for f in found if f.topic == "Are the samples sound" and "weight" in f.text]
    said = [f"{'!' if f.notable else ' '} {f.text}" for f in found]
    assert said == sentences


def test_overlong_responses_are_named_where_they_are_punished(tmp_path):
    records = constant(truncated_fraction=0.1)
    (cut,) = [f.text for f in write(tmp_path, records, algorithm="dapo") if "were cut" in f.text]
    assert "10.0% of the late responses" in cut
    assert cut.endswith("dapo takes up to 1 off the reward of a response in the last 20% of that "
                        "length, and 1 where it was cut.")  # fmt: skip
    (cut,) = [f.text for f in write(tmp_path, records, algorithm="grpo") if "were cut" in f.text]
    assert "off the reward" not in cut


def test_a_loss_near_zero_is_explained(tmp_path):
    on = {f.topic: f.text for f in write(tmp_path, constant(clip_fraction=0.0))}
    assert "every ratio is exactly 1" in on["Is the loss near zero, and why"]
    assert on["Does clipping act"].startswith("It cannot")
    found = write(tmp_path, constant(loss=0.8, grad_norm=3.0), updates_per_step=2)
    about = [f.text for f in found if f.topic == "Is the loss near zero, and why"]
    assert "|loss| is 0.800" in about[0] and "max_grad_norm = 1 in 100%" in about[1]


def test_dynamic_sampling(tmp_path):
    found = write(tmp_path, constant(sampled_questions=100.0), algorithm="dapo")
    assert any("drew 100 questions a step to learn from at most 40" in f.text for f in found)


def test_a_real_run(tmp_path, monkeypatch, capsys):
    """Without a warm start every answer is wrong, and that is what it says."""
    monkeypatch.setattr(riskpo.run, "warm_start", lambda *args, **kwargs: (0, 0.0))
    config = TrainConfig(
        run_dir=str(tmp_path), algorithm="grpo", steps=2, questions_per_step=5,
        responses_per_question=2, eval_questions=5, eval_samples=2, save_every_steps=0,
    )  # fmt: skip
    train(config)
    capsys.readouterr()
    assert main(["explain", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100 and "\n    " in printed
    text = " ".join(printed.split())
    assert "! Of the sampled questions 100% had only wrong responses" in text
    assert "! 100% of the responses that were learned from had advantage 0" in text
    assert "nothing is learned" in text and "20 verdicts" in text
    assert "Which counters moved: Too short to tell from noise: 2 steps; 15 are enough." in text
    assert main(["explain", str(tmp_path / "nothing")]) == 2
    with pytest.raises(ValueError, match="no finished step"):
        (tmp_path / "metrics.jsonl").write_text("")
        explain(tmp_path)

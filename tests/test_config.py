"""Settings: precedence, the errors, and what they suggest."""

from __future__ import annotations

import dataclasses
import re

import pytest

from riskpo.cli import main
from riskpo.config import (
    LoraConfig,
    MemoryConfig,
    SamplerConfig,
    TrainConfig,
    changes,
    locked,
    read_toml,
    resolve,
    to_toml,
    validate,
)


def toml(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_some_forty_fields_and_units():
    """Groups are tables of their own."""
    single = [f for f in dataclasses.fields(TrainConfig) if "Config" not in str(f.type)]
    assert len(single) <= 41


def test_round_trip_through_toml(tmp_path):
    config = TrainConfig(
        steps=7,
        learning_rate=1e-5,
        log_with=("tensorboard",),
        beta=0.9,
        memory=MemoryConfig(checkpointing=True, head_mib=64),
    )
    assert read_toml(toml(tmp_path, to_toml(config))) == config


def test_unknown_key_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="'lerning_rate'.*Did you mean 'learning_rate'"):
        read_toml(toml(tmp_path, "lerning_rate = 1e-6\n"))
    with pytest.raises(ValueError, match="'head_mb'.*MemoryConfig.*Did you mean 'head_mib'"):
        read_toml(toml(tmp_path, "[memory]\nhead_mb = 6\n"))
    with pytest.raises(ValueError, match="memory=6"):
        read_toml(toml(tmp_path, "memory = 6\n"))


def test_wrong_type_names_the_key(tmp_path):
    with pytest.raises(ValueError, match="steps='many'"):
        read_toml(toml(tmp_path, 'steps = "many"\n'))
    assert read_toml(toml(tmp_path, "learning_rate = 1\n")).learning_rate == 1.0
    with pytest.raises(ValueError, match="steps=1.5"):
        read_toml(toml(tmp_path, "steps = 1.5\n"))


def test_command_line_wins_over_file_over_defaults(tmp_path, capsys):
    path = toml(tmp_path, "steps = 5\nseed = 3\n")
    assert main(["train", "--config", str(path), "--seed", "4", "--print-config"]) == 0
    printed = read_toml(toml(tmp_path, capsys.readouterr().out))
    assert (printed.steps, printed.seed, printed.questions_per_step) == (5, 4, 40)
    assert printed.baseline == "leave-one-out" and printed.learning_rate == 3e-4


def test_demo_overrides_only_the_demo_and_only_the_silent():
    demo, overrides = resolve(TrainConfig())
    assert overrides == {"baseline": "leave-one-out"} and demo.baseline == "leave-one-out"
    own, overrides = resolve(TrainConfig(baseline="natural"))
    assert not overrides and own.baseline == "natural"
    real, overrides = resolve(TrainConfig(model="m", data="d.jsonl"))
    assert not overrides and real.baseline is None and real.learning_rate == 1e-6
    assert not resolve(TrainConfig(algorithm="grpo"))[1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "m"}, "data=None with model='m'"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"log_with": ("tensorbord",)}, "log_with='tensorbord'"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"steps": -1}, "steps=-1"),
        ({"memory": MemoryConfig(head_mib=0)}, "memory.head_mib=0"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm=inf"),
        ({"sampler": SamplerConfig(engine="vlm")}, "sampler.engine='vlm'"),
        ({"sampler": SamplerConfig(engine="vllm")}, "vllm' with the embedded model"),
        ({"sampler": SamplerConfig(correction="is")}, "sampler.correction='is'"),
        ({"sampler": SamplerConfig(level="word")}, "sampler.level='word'"),
        ({"sampler": SamplerConfig(cap=0.0)}, "sampler.cap=0.0"),
        ({"sampler": SamplerConfig(gpu_share=1.5)}, "sampler.gpu_share=1.5"),
        ({"lora": LoraConfig(rank=4)}, "lora.rank with the embedded model"),
        ({"updates_per_step": 3}, "questions_per_step=40 with updates_per_step=3"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        validate(dataclasses.replace(TrainConfig(), **changes))


@pytest.mark.parametrize("command", ["train", "eval", "plan"])
def test_help_explains_every_setting(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = re.sub(r"\x1b\[[0-9;]*m|│", "", capsys.readouterr().out)
    # nothing between an option, with what it takes, and its default
    assert not re.findall(r"(--\S+)(?: \S+)*(?:\n\s+|\s{2,})\(default", text)
    assert text.count("(default") > 5
    assert command != "train" or "--config FILE.toml" in text and "--print-config" in text


def test_validation_errors_are_one_line_and_status_two(capsys):
    assert main(["train", "--print-config", "--updates-per-step", "3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([]) == 2 and main(["--help"]) == 0


def changed_fields(saved, config):
    return [text for name, text in changes(saved, config).items() if locked(name, text)]


def test_changed_fields_are_named_and_steps_may_grow():
    saved = dataclasses.asdict(TrainConfig())
    saved["log_with"] = []
    assert changed_fields(saved, TrainConfig(steps=900, save_every_steps=1)) == []
    changed = TrainConfig(beta=0.9, seed=2, memory=MemoryConfig(optimizer="8bit", head_mib=64))
    assert changed_fields(saved, changed) == [
        "seed: 0 -> 2",
        "beta: None -> 0.9",
        "memory.optimizer: 'device' -> '8bit'",
    ]
    assert changes(saved, changed)["memory.head_mib"] == "memory.head_mib: 300 -> 64"
    del saved["sampler"], saved["verifier_seconds"]  # as a run of an earlier version has it
    assert changed_fields(saved, TrainConfig()) == []

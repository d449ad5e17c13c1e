"""RiskPOConfig: the paper's defaults, every setting of the bundles, and what it refuses."""

import dataclasses
import inspect

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install 'riskpo[trl]'")

from transformers import HfArgumentParser  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from riskpo.integrations import common as window  # noqa: E402
from riskpo.integrations.trl.trainer import RiskPOConfig, RiskPOTrainer  # noqa: E402
from riskpo_kernels import RiskPOAdvantage  # noqa: E402
from tests.integrations.trl_toy import SETTINGS, config, questions, token_share  # noqa: E402
from tests.toy import tiny_policy  # noqa: E402


def test_every_setting_of_the_advantage_is_a_field(tmp_path):
    settings = RiskPOAdvantage("paper").settings
    names = {f"riskpo_{field.name}" for field in dataclasses.fields(settings)}
    ours = {f.name for f in dataclasses.fields(RiskPOConfig)}
    assert names <= ours
    built = config(tmp_path, riskpo_preset="official-easy", riskpo_w_mix=2.0, seed=11)
    expected = RiskPOAdvantage("official-easy", w_mix=2.0, bundle_size=2, seed=11).settings
    assert built.advantage().settings == expected
    assert config(tmp_path, riskpo_seed=5).advantage().settings.seed == 5


def test_the_defaults_are_the_papers_and_the_command_line_sets_them():
    rest = ["--output_dir", "x", "--use_cpu", "--bf16", "false", "--gradient_checkpointing"]
    rest += ["false", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "5"]
    (parsed,) = HfArgumentParser(RiskPOConfig).parse_args_into_dataclasses(
        [*rest, "--riskpo_omega", "0.7"]
    )
    assert (parsed.epsilon, parsed.epsilon_high) == (3e-4, 4e-4)
    assert (parsed.importance_sampling_level, parsed.loss_type) == ("sequence", "grpo")
    assert parsed.advantage().settings == dataclasses.replace(
        RiskPOAdvantage("paper").settings, omega=0.7, seed=parsed.seed
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"riskpo_bundle_size": 5}, "2 questions per generation batch.*riskpo_bundle_size=5.*20"),
        ({"riskpo_bundel_size": 5}, "riskpo_bundel_size"),
        ({"riskpo_form": "paperr"}, "form='paperr'"),
        ({"riskpo_scale": "bundle-std"}, "scale='bundle-std'"),
        ({"loss_type": "vespo"}, "loss_type='vespo'; expected one of"),
        ({"loss_type": "cispo"}, "importance_sampling_level='sequence'.*'token' with cispo"),
        (
            {"loss_type": "sapo", "importance_sampling_level": "token", "delta": 3.0},
            "delta=3.0; expected .*None .with cispo and sapo",
        ),
        ({"loss_type": "bnpo"}, "loss_type='bnpo'"),
        ({"scale_rewards": "group"}, "scale_rewards='group'; expected 'none'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
        ({"delta": 1.0003}, "delta=1.0003; expected above 1.0004"),
        ({"beta": 0.1, "use_bias_correction_kl": True}, "use_bias_correction_kl=True"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2; expected 1.0"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy=True"),
        ({"riskpo_preset": "matched", "riskpo_difficulty": "prior"}, "riskpo_prior_column=None"),
        ({"riskpo_prior_column": "p"}, "riskpo_difficulty='history' with .*'p'"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True.*use_kernels"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level='word'"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_would_change_silently_is_refused(tmp_path, changes, message):
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        config(tmp_path, **changes)


def test_surplus_questions_may_be_dropped(tmp_path):
    changes = {"riskpo_bundle_size": 3, "per_device_train_batch_size": 16}
    assert config(tmp_path, **changes, riskpo_leftover="drop").riskpo_bundle_size == 3
    with pytest.raises(ValueError, match="4 questions.*multiple of riskpo_bundle_size=3"):
        config(tmp_path, **changes)


def test_other_arguments_and_environments_are_refused(tmp_path):
    policy = tiny_policy()
    rest = {"train_dataset": questions(), "processing_class": policy.tokenizer}
    for args in (None, GRPOConfig(output_dir=str(tmp_path), **SETTINGS)):
        with pytest.raises(TypeError, match="expected a RiskPOConfig"):
            RiskPOTrainer(policy.model, token_share, args, **rest)
    with pytest.raises(ValueError, match="got an environment_factory; expected a dataset"):
        RiskPOTrainer(
            policy.model, token_share, config(tmp_path), environment_factory=object, **rest
        )


def test_the_constructor_takes_what_grpo_trainers_takes():
    theirs = list(inspect.signature(GRPOTrainer.__init__).parameters)
    assert theirs[:4] == ["self", "model", "reward_funcs", "args"]  # ours names these, passes rest


@pytest.mark.parametrize(
    "found, fits",
    [("1.16.0", True), ("1.16.3", True), ("1.16.1rc1", True), ("1.15.9", False), ("1.17.0", False)],
)
def test_other_versions_fail_loudly(monkeypatch, found, fits):
    monkeypatch.setattr(window, "version", lambda package: found)
    if fits:
        return window.check_window("trl", "1.16", "1.17")
    with pytest.raises(ImportError, match=rf"got trl {found}; .*pip install 'trl>=1.16,<1.17'"):
        window.check_window("trl", "1.16", "1.17")


def test_a_missing_host_says_how_to_get_it():
    with pytest.raises(ImportError, match="no-such-host is not installed. Run: pip install"):
        window.check_window("no-such-host", "1.0", "2.0")

"""Fed GRPO's advantages and options, the loss and its gradients are those of TRL's own trainer."""

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'riskpo[trl]'")

from riskpo.integrations.trl.trainer import RiskPOTrainer  # noqa: E402
from tests.integrations.trl_toy import losses, trainer  # noqa: E402
from tests.toy import tiny_policy  # noqa: E402

B, P, C = 8, 5, 7
ROUNDING = 1e-5  # relative norm, float32 on both sides


def native(folder, **changes):
    from trl import GRPOTrainer

    return trainer(folder, GRPOTrainer, **changes)


def batch(vocab: int, *, seed: int = 0, **extra) -> dict:
    """A micro-batch as TRL hands it to the loss: left-padded prompts, one empty completion."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, C + 1, (B,), generator=g)
    lengths[3] = 0
    mask = (torch.arange(C) < lengths[:, None]).long()
    prompt_mask = (torch.arange(P) >= torch.randint(0, P - 1, (B, 1), generator=g)).long()
    return {
        "prompt_ids": torch.randint(2, vocab, (B, P), generator=g) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(2, vocab, (B, C), generator=g) * mask,
        "completion_mask": mask,
        "advantages": torch.randn(B, generator=g),
        "num_items_in_batch": mask.sum() * 3,
        **extra,
    }


def old_logprob(run, inputs) -> torch.Tensor:
    """The policy's own log-probs, moved enough for every clip to act on some rows."""
    with torch.no_grad():
        logprob, _, _ = run._get_per_token_logps_and_entropies(
            run.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            C,
        )
    noise = torch.randn(logprob.shape, generator=torch.Generator().manual_seed(7))
    return logprob + 0.4 * noise


def loss_and_gradient(run, inputs, steps: int = 2) -> tuple[float, torch.Tensor]:
    run.model.train()
    run.current_gradient_accumulation_steps = steps
    run.model.zero_grad()
    loss = run._compute_loss(run.model, inputs)
    loss.backward()
    gradients = [p.grad.flatten() for p in run.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


TOKEN = {"importance_sampling_level": "token", "epsilon": 0.2, "epsilon_high": 0.28}
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.08}
PLAIN = {"scale_rewards": "none"}


@pytest.mark.parametrize(
    "options",
    [
        {**TOKEN, "loss_type": "grpo"},
        {**TOKEN, "loss_type": "dapo"},
        {**TOKEN, "loss_type": "dr_grpo", "delta": 1.5},
        {**TOKEN, "loss_type": "dapo", "entropy_coef": 0.01, "gradient_accumulation_steps": 2},
        {**SEQUENCE, "loss_type": "grpo"},
        {**SEQUENCE, "loss_type": "dapo", "delta": 1.2},
    ],
    ids=lambda o: f"{o['importance_sampling_level']}-{o['loss_type']}",
)
@pytest.mark.parametrize("riskpo_head", [True, False], ids=["our-head", "their-head"])
def test_one_micro_batch_is_native_grpo(tmp_path, options, riskpo_head):
    theirs = native(tmp_path, **PLAIN, **options)
    ours = trainer(tmp_path, riskpo_head=riskpo_head, **PLAIN, **options)
    inputs = batch(theirs.model.config.vocab_size)
    inputs["old_per_token_logps"] = old_logprob(theirs, inputs)
    expected, expected_gradient = loss_and_gradient(theirs, inputs)
    loss, gradient = loss_and_gradient(ours, inputs)
    assert loss == pytest.approx(expected, rel=ROUNDING)
    assert distance(gradient, expected_gradient) < ROUNDING
    cut = theirs._metrics["train"]["clip_ratio/region_mean"][0]
    assert cut > 0, "nothing is clipped: choose other inputs"
    # TRL counts the empty sequence among those of the sequence ratio; ours are shares of the rest
    share = 1.0 if options["importance_sampling_level"] == "token" else B / (B - 1)
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        mine = ours._metrics["train"][name][0]
        assert mine == pytest.approx(share * theirs._metrics["train"][name][0], abs=1e-6), name
    assert ours._metrics["train"]["entropy"][0] == pytest.approx(
        theirs._metrics["train"]["entropy"][0], rel=ROUNDING
    )


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "cispo", "epsilon_high": 1.3},
        {"loss_type": "sapo", "sapo_temperature_neg": 2.0},
        {"loss_type": "grpo", "off_policy_mask_threshold": 0.1},
        {"loss_type": "grpo", "off_policy_mask_threshold": 0.1, "sampled": 0.5},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_the_newer_losses_are_native_too(tmp_path, options):
    options = {**PLAIN, **TOKEN, **options}
    sampled = options.pop("sampled", None)
    theirs, ours = native(tmp_path, **options), trainer(tmp_path, **options)
    inputs = batch(theirs.model.config.vocab_size)
    inputs["old_per_token_logps"] = old_logprob(theirs, inputs)
    if sampled is not None:  # vLLM's own log-probs are what is compared then, and may lack one
        moved = sampled * torch.randn((B, 1), generator=torch.Generator().manual_seed(5))
        inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"] + moved
        inputs["sampling_per_token_logps"][0, 0] = torch.nan
    expected, expected_gradient = loss_and_gradient(theirs, inputs)
    loss, gradient = loss_and_gradient(ours, inputs)
    assert loss == pytest.approx(expected, rel=ROUNDING)
    assert distance(gradient, expected_gradient) < ROUNDING
    ours.off_policy_mask_threshold = None
    ours.args.epsilon_high, ours.args.sapo_temperature_neg = 1.1, 1.0  # each acts on some tokens
    assert loss_and_gradient(ours, inputs)[0] != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("shape", [(B, 1), (B, C)], ids=["sequence", "token"])
@pytest.mark.parametrize("ratio", [TOKEN, SEQUENCE], ids=["token-ratio", "sequence-ratio"])
def test_sampler_mismatch_weights_are_native(tmp_path, monkeypatch, shape, ratio):
    """vLLM's correction, as TRL computes it for each of its modes, without a vLLM."""
    options = {**PLAIN, **ratio, "loss_type": "grpo"}
    theirs, ours = native(tmp_path, **options), trainer(tmp_path, **options)
    weight = 3 * torch.rand(shape, generator=torch.Generator().manual_seed(3))
    weight[1] = 0.0  # a masked sequence
    inputs = batch(theirs.model.config.vocab_size, importance_sampling_ratio=weight)
    inputs["old_per_token_logps"] = old_logprob(theirs, inputs)
    monkeypatch.setattr(theirs, "use_vllm", True)
    expected, expected_gradient = loss_and_gradient(theirs, inputs)
    loss, gradient = loss_and_gradient(ours, inputs)
    assert loss == pytest.approx(expected, rel=ROUNDING)
    assert distance(gradient, expected_gradient) < ROUNDING


def test_log_probs_that_the_sampler_left_out_are_counted(tmp_path):
    """TRL has given their tokens the weight 1; those of padding are not missing."""
    ours = trainer(tmp_path, **PLAIN, **TOKEN)
    inputs = batch(ours.model.config.vocab_size)
    sampled = torch.where(inputs["completion_mask"] != 0, -1.0, torch.nan)
    sampled[0, 0] = torch.nan
    assert inputs["completion_mask"][0, 0] == 1
    loss, _ = loss_and_gradient(ours, inputs | {"sampling_per_token_logps": sampled})
    assert loss == loss and ours._metrics["train"]["riskpo/sampler_missing"] == [1.0]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_tokens_that_a_tool_wrote_do_not_count(tmp_path, loss_type):
    options = {**PLAIN, **SEQUENCE, "loss_type": loss_type}
    theirs, ours = native(tmp_path, **options), trainer(tmp_path, **options)
    sampled = torch.randint(0, 2, (B, C), generator=torch.Generator().manual_seed(4))
    inputs = batch(theirs.model.config.vocab_size, tool_mask=sampled)
    inputs["old_per_token_logps"] = old_logprob(theirs, inputs)
    expected, expected_gradient = loss_and_gradient(theirs, inputs)
    loss, gradient = loss_and_gradient(ours, inputs)
    assert loss == pytest.approx(expected, rel=ROUNDING)
    assert distance(gradient, expected_gradient) < ROUNDING
    inputs["tool_mask"] = torch.ones_like(sampled)
    assert loss_and_gradient(ours, inputs)[0] != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("unbiased", [False, True])
def test_kl_to_the_reference_is_native(tmp_path, unbiased):
    policy = tiny_policy()
    policy.model.save_pretrained(tmp_path / "model")  # TRL loads the reference by name
    policy.model.config._name_or_path = str(tmp_path / "model")
    options = {**PLAIN, **TOKEN, "loss_type": "grpo", "beta": 0.1}
    options["use_bias_correction_kl"] = unbiased
    theirs = native(tmp_path, policy=policy, **options)
    inputs = batch(theirs.model.config.vocab_size)
    inputs["old_per_token_logps"] = old_logprob(theirs, inputs)
    noise = torch.randn((B, C), generator=torch.Generator().manual_seed(9))
    inputs["ref_per_token_logps"] = inputs["old_per_token_logps"] + 0.3 * noise
    expected, expected_gradient = loss_and_gradient(theirs, inputs)
    ours = trainer(tmp_path, RiskPOTrainer, **options, policy=tiny_policy_at(tmp_path / "model"))
    loss, gradient = loss_and_gradient(ours, inputs)
    assert loss == pytest.approx(expected, rel=ROUNDING)
    assert distance(gradient, expected_gradient) < ROUNDING
    assert ours._metrics["train"]["kl"][0] == pytest.approx(
        theirs._metrics["train"]["kl"][0], rel=1e-4
    )


def tiny_policy_at(folder):
    policy = tiny_policy()
    policy.model.config._name_or_path = str(folder)
    return policy


@pytest.mark.parametrize(
    "schedule",
    [
        {"gradient_accumulation_steps": 2},
        {"steps_per_generation": 2, "num_iterations": 2},
    ],
    ids=["accumulation", "reuse"],
)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_a_run_with_the_mean_is_a_grpo_run(tmp_path, schedule, loss_type):
    """Bundles of one question and the mean instead of a risk: GRPO, sampling and all."""
    options = {**PLAIN, **TOKEN, **schedule, "loss_type": loss_type, "max_steps": 4}
    theirs = native(tmp_path / "theirs", **options)
    theirs.train()  # before the other is built: both sample from the process's generator
    ours = trainer(tmp_path / "ours", riskpo_form="mean", **options | {"riskpo_bundle_size": 1})
    ours.train()
    assert list(ours._logs["completion"]) == list(theirs._logs["completion"])
    assert list(ours._logs["advantages"]) == pytest.approx(
        list(theirs._logs["advantages"]), abs=1e-6
    )
    assert losses(ours) == pytest.approx(losses(theirs), rel=ROUNDING, abs=1e-6)
    expected, norms = ([r["grad_norm"] for r in t.state.log_history[:-1]] for t in (theirs, ours))
    assert min(expected) > 1e-3
    assert norms == pytest.approx(expected, rel=1e-4)
    pairs = zip(ours.model.parameters(), theirs.model.parameters(), strict=True)
    assert all(distance(a, b) < ROUNDING for a, b in pairs)

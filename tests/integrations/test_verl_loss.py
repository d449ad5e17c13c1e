"""verl's policy losses riskpo and riskpo_token against the reference and verl's own vanilla."""

from __future__ import annotations

import pytest
import torch

from riskpo_kernels import reference

core = pytest.importorskip(
    "verl.trainer.ppo.core_algos", reason="verl does not import here: run make test-hosts"
)
from verl.utils.metric import AggregationType, Metric  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402

from riskpo.integrations.verl import loss as verl_loss  # noqa: E402

B, T = 8, 10
MODES = list(verl_loss.AGGREGATES)


def config(low=3e-4, high=4e-4, **info):
    made = ActorConfig(
        strategy="fsdp",
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=2,
        clip_ratio_low=low,
        clip_ratio_high=high,
    )
    made.global_batch_info.update(info)
    return made


def inputs(seed: int = 0, spread: float = 0.05):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    old = -torch.rand(B, T, generator=g)
    new = old + spread * torch.randn(B, T, generator=g)
    return {
        "old_log_prob": old,
        "log_prob": new.requires_grad_(),
        "advantages": torch.randn(B, 1, generator=g) * mask,
        "response_mask": mask,
    }


def gradient(name, given, **options):
    given = dict(given, log_prob=given["log_prob"].detach().clone().requires_grad_())
    loss, metrics = core.get_policy_loss_fn(name)(**given, **options)
    loss.backward()
    return loss.detach(), given["log_prob"].grad, metrics


@pytest.mark.parametrize("mode, aggregate", verl_loss.AGGREGATES.items())
def test_the_loss_is_the_references(mode, aggregate):
    given = inputs(spread=1e-3)
    c = config(dp_size=2, batch_num_tokens=90, global_batch_size=32, loss_scale_factor=20)
    loss, slope, metrics = gradient("riskpo", given, loss_agg_mode=mode, config=c)
    total = {"token-mean": 90, "token-sum": 1, "seq-mean-token-sum-norm": 32 * 20}.get(mode, 32)
    new = given["log_prob"].detach().double().requires_grad_()
    expected = reference.clipped_surrogate(
        new, given["old_log_prob"].double(), given["advantages"][:, 0].double(),
        mask=given["response_mask"], ratio="sequence", clip_low=3e-4, clip_high=4e-4, dual_clip=3.0,
        aggregate=aggregate, constant=1.0, denominator=total / 2,
    )  # fmt: skip
    expected.loss.backward()
    torch.testing.assert_close(loss.double(), expected.loss.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(slope.double(), new.grad, rtol=1e-5, atol=1e-8)
    assert 0 < metrics["actor/pg_clipfrac"] < 1
    Metric.from_dict(metrics, aggregation=AggregationType.MEAN)  # as verl's ppo_loss does


def grpo(given):
    uid = [i // 4 for i in range(B)]
    rewards = torch.zeros(B, T)
    rewards[:, 0] = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 1])
    return core.get_adv_estimator_fn("grpo")(rewards, given["response_mask"].long(), uid)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [False, True])
def test_with_token_ratios_and_grpo_it_is_vanilla(mode, weighted):
    given = inputs(spread=1.5)  # wide enough for both bounds and the dual clip
    given["advantages"] = grpo(given)
    given["response_mask"] = given["response_mask"].long()
    if weighted:
        given["rollout_is_weights"] = torch.rand(B, T) * given["response_mask"]
    options = {
        "loss_agg_mode": mode,
        "config": config(0.2, 0.3, dp_size=2, batch_num_tokens=77, global_batch_size=16),
    }
    ours, theirs = (gradient(name, given, **options) for name in ("riskpo_token", "vanilla"))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-7)
    for name, value in theirs[2].items():
        assert ours[2][name] == pytest.approx(value, abs=1e-5)
    assert theirs[2]["actor/pg_clipfrac"] > 0 and theirs[2]["actor/pg_clipfrac_lower"] > 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["cispo", "sapo"])
def test_the_newer_losses_are_verls(name, weighted):
    given = inputs(spread=1.5)
    given["advantages"] = grpo(given)
    if weighted:
        given["rollout_is_weights"] = torch.rand(B, T) * given["response_mask"]
    made = config(0.2, 0.3, dp_size=2, batch_num_tokens=77, global_batch_size=16)
    object.__setattr__(made, "tau_neg", 2.0)
    options = {"loss_agg_mode": "seq-mean-token-mean", "config": made}
    ours, theirs = (gradient(n, given, **options) for n in (f"riskpo_{name}", name))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-7)
    other = config(0.9, 3.0, dp_size=2, batch_num_tokens=77, global_batch_size=16)
    loss = gradient(f"riskpo_{name}", given, loss_agg_mode=MODES[2], config=other)[0]
    assert not torch.allclose(loss, ours[0], rtol=1e-3)  # the settings act


def test_gmpo_is_verls_geo_mean():
    given = inputs(spread=0.6)
    assert given["response_mask"].any(1).all()
    made = config(0.2, 0.3, dp_size=1, global_batch_size=B)
    ours, theirs = (gradient(n, given, config=made) for n in ("riskpo_gmpo", "geo_mean"))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-7)
    assert (ours[1][given["response_mask"]] == 0).float().mean() > 0.2  # held tokens


@pytest.mark.parametrize("mode", MODES)
def test_icepop_is_the_references(mode):
    given = inputs(spread=0.6)
    c = config(0.3, 0.5, dp_size=2, batch_num_tokens=90, global_batch_size=32, loss_scale_factor=20)
    loss, slope, metrics = gradient("riskpo_icepop", given, loss_agg_mode=mode, config=c)
    total = {"token-mean": 90, "token-sum": 1, "seq-mean-token-sum-norm": 32 * 20}.get(mode, 32)
    new = given["log_prob"].detach().double().requires_grad_()
    expected = reference.clipped_surrogate(
        new, given["old_log_prob"].double(), given["advantages"].double(), loss="icepop",
        mask=given["response_mask"], ratio="token", clip_low=0.3, clip_high=0.5,
        aggregate=verl_loss.AGGREGATES[mode], constant=1.0, denominator=total / 2,
    )  # fmt: skip
    expected.loss.backward()
    torch.testing.assert_close(loss.double(), expected.loss.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(slope.double(), new.grad, rtol=1e-5, atol=1e-8)
    assert 0.1 < metrics["actor/pg_clipfrac"] < 0.9


@pytest.mark.parametrize("name", verl_loss.LOSSES)
@pytest.mark.parametrize("mode", MODES)
def test_uneven_micro_batches_on_two_ranks_give_the_whole_batch(name, mode):
    """Ranks' gradients are averaged, so the mean over ranks of sums over micro-batches counts."""
    given = inputs()
    info = {"batch_num_tokens": given["response_mask"].sum(), "global_batch_size": B,
            "loss_scale_factor": 7}  # fmt: skip
    whole = gradient(name, given, loss_agg_mode=mode, config=config(**info, dp_size=1))
    parts = config(**info, dp_size=2)
    loss, slopes = 0.0, []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6), slice(6, 8)):
        piece = {key: value[rows] for key, value in given.items()}
        one = gradient(name, piece, loss_agg_mode=mode, config=parts)
        loss, slopes = loss + one[0] / 2, [*slopes, one[1] / 2]
    torch.testing.assert_close(loss, whole[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.cat(slopes), whole[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["riskpo", "riskpo_token"])
def test_masked_values_are_never_read(name):
    given = inputs()
    expected = gradient(name, given, config=config())
    hole = ~given["response_mask"]
    poisoned = {
        key: value.detach().masked_fill(hole, float("nan")) if key != "response_mask" else value
        for key, value in given.items()
    }
    got = gradient(name, poisoned, config=config())
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert got[2] == expected[2]


@pytest.mark.parametrize("name", ["riskpo", "riskpo_token"])
def test_a_weight_that_is_missing_counts_as_0(name):
    given = inputs()
    weights = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) + 0.5
    hole = torch.zeros(B, T, dtype=torch.bool)
    hole[2, :2] = True
    assert given["response_mask"][2, :2].all()
    zero, holed = weights.masked_fill(hole, 0.0), weights.masked_fill(hole, torch.nan)
    expected = gradient(name, given | {"rollout_is_weights": zero}, config=config())
    got = gradient(name, given | {"rollout_is_weights": holed}, config=config())
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    missing = "actor/riskpo_sampler_missing"
    assert got[2] == expected[2] | {missing: 2.0} and expected[2][missing] == 0


@pytest.mark.parametrize("name", ["riskpo", "riskpo_token"])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_a_batch_of_which_nothing_counts_has_loss_0(name, mode):
    given = inputs()
    given["response_mask"] = torch.zeros_like(given["response_mask"])
    given["rollout_is_weights"] = torch.full((B, T), torch.nan)
    for sizes in ({}, {"dp_size": 2, "batch_num_tokens": 0, "global_batch_size": 0}):
        loss, slope, metrics = gradient(
            name, given, loss_agg_mode=mode, config=config(3e-4, 4e-4, **sizes)
        )
        assert loss == 0 and not slope.any() and not any(metrics.values())


def test_what_does_not_fit_is_named():
    given = inputs()
    with pytest.raises(ValueError, match=r"advantages \[8\]; expected"):
        short = given | {"advantages": given["advantages"][:, 0]}
        verl_loss.riskpo_policy_loss(**short, config=config())
    square = {name: x[:, :B] for name, x in given.items()}  # here [B] would fit the tokens
    for loss in (verl_loss.riskpo_policy_loss, verl_loss.riskpo_token_policy_loss):
        for name in ("advantages", "rollout_is_weights"):
            each = square | {name: given["advantages"][:, 0]}
            with pytest.raises(ValueError, match=r"\[8\]; expected \[8, 8\]"):
                loss(**each, config=config())
    with pytest.raises(ValueError, match="got loss_agg_mode='mean'"):
        verl_loss.riskpo_policy_loss(**given, loss_agg_mode="mean", config=config())
    with pytest.raises(ValueError, match="dp_size=2 without global_batch_size"):
        verl_loss.riskpo_policy_loss(**given, config=config(dp_size=2))
    with pytest.warns(UserWarning, match="suit token ratios"):
        verl_loss.riskpo_policy_loss(**given, config=config(0.2, 0.2))
    given["advantages"] = torch.rand(B, T)
    with pytest.raises(ValueError, match="differ within a sequence"):
        verl_loss.riskpo_policy_loss(**given, config=config())

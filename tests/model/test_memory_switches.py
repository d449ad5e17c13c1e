"""Every switch of MemoryConfig on the model: the same numbers with it and without it."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from riskpo.algorithms import LossOptions
from riskpo.config import MemoryConfig, RunConfig, TrainConfig, validate
from riskpo.model.activation_offload import CpuCheckpoints
from riskpo.model.memory_switches import apply_switches, park_checkpoints
from riskpo.model.tiled_mlp import tile_mlps, tiled
from riskpo.trainer.optimizer import Optimizer
from riskpo.trainer.parallel import ParallelModel
from riskpo.trainer.update import update
from riskpo_kernels.causal_lm import find_head
from tests.toy import random_rollouts, tiny_policy
from tools.plain_transfers import PlainTransfers

PLAN = RunConfig(micro_batch_tokens=40)


class FakeTransfers:
    """A host made of clones. What has been sent and is not waited for yet is still garbage."""

    def __init__(self):
        self.most_out = self.out_now = self.most_back = self.back_now = 0

    def out(self, tensor):
        self.out_now += 1
        self.most_out = max(self.most_out, self.out_now)
        host = torch.full_like(tensor, float("nan"))
        return host, ("out", host, tensor)

    def back(self, host, sent):
        self.back_now += 1
        self.most_back = max(self.most_back, self.back_now)
        self._land(sent)  # the stream waits for the copy that went out
        arrived = torch.full_like(host, float("nan"))
        return arrived, ("back", arrived, host)

    def wait(self, ticket):
        if ticket[0] == "out":
            self.out_now -= 1
        else:
            self.back_now -= 1
        self._land(ticket)

    @staticmethod
    def _land(ticket):
        ticket[1].data.copy_(ticket[2].detach())


def gradients(switch=None, dtype=torch.float32, **changes):
    """Gradients of one update's micro-batches, by name, with a switch turned on first."""
    model = tiny_policy(**changes).model.to(dtype)
    apply_switches(model, MemoryConfig(attention="sequences"))
    if switch is not None:
        switch(model)
    optimizer = Optimizer(
        model.parameters(), learning_rate=1e-3, warmup_steps=0, weight_decay=0.0, max_grad_norm=1e9
    )
    seen = {}
    step = optimizer.step

    def spy(total):
        seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
        return step(total)

    optimizer.step = spy
    advantage = torch.randn(20, generator=torch.Generator().manual_seed(1))
    update(
        ParallelModel(model),
        find_head(model),
        optimizer,
        random_rollouts(14),
        advantage,
        LOSS,
        PLAN,
    )
    return seen


LOSS = LossOptions(ratio="token", aggregate="token-mean")


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = expected[name].abs().max().clamp(min=1e-8)
        assert ((gradient - expected[name]).abs().max() / scale) <= tolerance, name


def test_checkpointing_changes_no_bit():
    memory = MemoryConfig(checkpointing=True)
    assert_same(gradients(lambda m: apply_switches(m, memory)), gradients(), 0.0)


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_parked_checkpoints_change_no_bit(layers):
    transfers = FakeTransfers()

    def switch(model):
        apply_switches(model, MemoryConfig(checkpointing=True))
        park_checkpoints(model, CpuCheckpoints(transfers))

    parked = gradients(switch, num_hidden_layers=layers)
    assert_same(parked, gradients(num_hidden_layers=layers), 0.0)
    assert transfers.most_out == min(2, layers), "inputs on their way out"
    assert transfers.most_back == min(2, layers), "one being used, one ahead of its use"


def test_empty_tensors_stay_where_they_are():
    """torch 2.11 saves one beside each layer's input: parked, two layers' inputs were one apart."""
    transfers = FakeTransfers()
    checkpoints, x = CpuCheckpoints(transfers), torch.randn(3, requires_grad=True)
    y = x
    for _ in range(5):
        y = checkpoints(lambda given, _: given.exp(), y * 0.1, torch.empty(0))
    y.sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()
    assert (transfers.most_out, transfers.most_back) == (2, 2)


def test_offloading_on_the_cpu():
    """The switch itself, with copies in the same memory: every layer's input waits, then goes."""
    memory = MemoryConfig(checkpointing=True, offload_checkpoints=True)
    transfers = PlainTransfers()
    parked = gradients(lambda m: apply_switches(m, memory, transfers), num_hidden_layers=5)
    assert_same(parked, gradients(num_hidden_layers=5), 0.0)
    longest = max(len(tokens) for tokens in random_rollouts(14).tokens) - 1  # inputs of it
    size = tiny_policy().model.config.hidden_size * torch.float32.itemsize
    assert 5 * longest * size <= transfers.most <= 5 * PLAN.micro_batch_tokens * size
    assert transfers._waiting == 0


def test_offloading_does_nothing_on_the_cpu_by_itself():
    model = tiny_policy().model
    apply_switches(model, MemoryConfig(checkpointing=True, offload_checkpoints=True))
    assert not any(
        isinstance(getattr(module, "_gradient_checkpointing_func", None), CpuCheckpoints)
        for module in model.modules()
    )


def test_parked_tensors_go_with_their_graph():
    """A forward without a backward leaves nothing behind, nor a link for the next one."""
    checkpoints = CpuCheckpoints(FakeTransfers())
    layer = torch.nn.Linear(4, 4)
    x = torch.randn(3, 4, requires_grad=True)
    dropped = checkpoints(layer, x)
    del dropped
    gc.collect()
    assert checkpoints._last() is None
    y = checkpoints(layer, checkpoints(layer, x))
    y.sum().backward()
    expected = torch.autograd.grad(layer(layer(x)).sum(), x)[0]
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("rows", [1, 7, 16, 1000])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tiles_change_nothing_but_rounding(rows, checkpointing):
    memory = MemoryConfig(checkpointing=checkpointing, mlp_tile_tokens=rows)
    found = gradients(lambda m: apply_switches(m, memory))
    assert_same(found, gradients(), 2e-5)


def test_tiles_are_no_less_exact_in_sixteen_bit():
    """512 tiles of one token: sums of bfloat16 gradients would drown in their own rounding."""
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.Linear(16, 8))
    exact, whole = copy.deepcopy(mlp).bfloat16().double(), copy.deepcopy(mlp).bfloat16()
    mlp = mlp.bfloat16()
    x, upstream = torch.randn(512, 8).bfloat16(), torch.randn(512, 8).bfloat16()
    tiled(mlp, mlp.forward, 1, x).backward(upstream)
    whole(x).backward(upstream)
    exact(x.double()).backward(upstream.double())
    for p, w, e in zip(mlp.parameters(), whole.parameters(), exact.parameters(), strict=True):
        error, plain = ((g.grad.double() - e.grad).norm() / e.grad.norm() for g in (p, w))
        assert error <= 2 * plain


def test_tiles_with_frozen_parts():
    """No gradient for the input, or for some weights, as LoRA leaves it."""
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 4))
    mlp[0].weight.requires_grad_(False)
    x = torch.randn(10, 4)
    tiled(mlp, mlp.forward, 3, x).sum().backward()
    found = [None if p.grad is None else p.grad.clone() for p in mlp.parameters()]
    mlp.zero_grad()
    mlp(x).sum().backward()
    for ours, p in zip(found, mlp.parameters(), strict=True):
        assert (ours is None) == (p.grad is None)
        if ours is not None:
            torch.testing.assert_close(ours, p.grad)


def test_tiles_refuse_what_they_would_change():
    model = tiny_policy().model
    model.model.layers[0].mlp.noise = torch.nn.Dropout(0.1)
    with pytest.raises(ValueError, match="dropout 0.1"):
        tile_mlps(model, 4)
    model = tiny_policy().model
    del model.model.layers[1].mlp
    with pytest.raises(ValueError, match="without `mlp`"):
        tile_mlps(model, 4)


def with_zero_rows(skip, advantage, entropy_coef=0.0):
    model = tiny_policy().model
    optimizer = Optimizer(
        model.parameters(), learning_rate=1e-3, warmup_steps=0, weight_decay=0.1, max_grad_norm=1e9
    )
    plan = RunConfig(
        micro_batch_tokens=40,
        memory=MemoryConfig(skip_zero_advantage=skip),
        entropy_coef=entropy_coef,
    )
    numbers = update(
        ParallelModel(model),
        find_head(model),
        optimizer,
        random_rollouts(14),
        advantage,
        LOSS,
        plan,
    )
    return model.state_dict(), numbers


@pytest.mark.parametrize("zeros", [10, 20])
def test_responses_without_advantage_may_stay_out(zeros):
    """Same step; fewer tokens. With nothing left one response still makes the gradients zero."""
    advantage = torch.randn(20, generator=torch.Generator().manual_seed(0))
    advantage[:zeros] = 0
    (all_in, seen), (skipped, fewer) = (with_zero_rows(x, advantage) for x in (False, True))
    assert fewer["tokens"] < seen["tokens"]
    assert (seen["skipped_responses"], fewer["skipped_responses"]) == (0.0, zeros)
    assert MemoryConfig().skip_zero_advantage
    assert fewer["loss"] == pytest.approx(seen["loss"], rel=1e-5, abs=1e-9)
    for name, value in all_in.items():
        torch.testing.assert_close(skipped[name], value, rtol=1e-4, atol=2e-6, msg=name)


def test_an_entropy_bonus_is_earned_by_every_response():
    advantage = torch.tensor([0.0] * 10 + [1.0] * 10)
    (all_in, seen), (skipped, fewer) = (with_zero_rows(x, advantage, 0.1) for x in (False, True))
    assert fewer["skipped_responses"] == 0.0 and fewer["tokens"] == seen["tokens"]
    assert all(torch.equal(skipped[name], value) for name, value in all_in.items())


def test_offloading_needs_checkpoints():
    with pytest.raises(ValueError, match="memory.checkpointing"):
        validate(TrainConfig(memory=MemoryConfig(offload_checkpoints=True)))
    with pytest.raises(ValueError, match="memory.optimizer"):
        validate(TrainConfig(memory=MemoryConfig(optimizer="cpu")))

"""The trainer where its parts are another on CUDA; each test runs on the CPU too, in small.

What CUDA alone has: torch's varlen kernel, copies to pinned memory on streams of their own, an
optimiser whose state is on another device than the weights, compiled decoding, and Triton kernels
under a bfloat16 model.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import riskpo.model.load
import riskpo.run
from riskpo.config import MemoryConfig, TrainConfig
from riskpo.model import attention, memory_switches
from riskpo.model.activation_offload import CudaTransfers
from riskpo.model.attention import VARLEN
from riskpo.model.isolation import packing_of
from riskpo.model.memory_switches import apply_switches
from riskpo.model.packing import hidden_states, pack
from riskpo.report.logs import read_records
from riskpo.train import train
from riskpo.trainer.checkpoint import latest_checkpoint
from riskpo.trainer.optimizer import Optimizer
from riskpo.types import Question, Rollouts
from tests.model.test_packing import MODELS, fake_varlen, model_of
from tests.toy import sample, save_arithmetic, tiny_policy
from tools.plain_transfers import PlainTransfers

on_both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
VOCAB = 14


def rollouts_of(lengths):
    """Random tokens, so many model inputs each."""
    made, g = Rollouts(), torch.Generator().manual_seed(0)
    for i, n in enumerate(lengths):
        made.tokens.append(torch.randint(2, VOCAB, (n + 1,), generator=g))
        made.prompt_len.append(1)
        made.logprob.append(torch.zeros(n))
        made.text.append("")
        made.truncated.append(False)
        made.question_id.append(str(i))
    return made


def scalar(hidden):
    """Something with a gradient for every hidden state, no two alike."""
    weights = torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device, dtype=hidden.dtype)
    return (hidden @ weights).square().sum()


# Varlen attention ------------------------------------------------------------------------------


def gradients(model, run):
    """Of run(model), by name: of the weights, and of every token's embedding instead of the table.

    The table's gradient is a sum over tokens whose rounding would hide the attention's.
    """
    embedded = []

    def keep(module, inputs, output):
        output.retain_grad()
        embedded.append(output)

    model.model.embed_tokens.register_forward_hook(keep)
    run(model)
    found = {n: p.grad for n, p in model.model.layers.named_parameters()}
    found["embedded"] = torch.cat([x.grad[0] for x in embedded])
    return {n: gradient.double().cpu() for n, gradient in found.items()}


def one_by_one(model, rollouts):
    device = next(model.parameters()).device
    for tokens in rollouts.tokens:
        ids = tokens[None, :-1].to(device)
        scalar(model.model(input_ids=ids, use_cache=False).last_hidden_state[0].double()).backward()


def packed(model, rollouts):
    batch = pack(rollouts, range(len(rollouts)), next(model.parameters()).device)
    scalar(hidden_states(model, batch).double()).backward()


@on_both
@pytest.mark.parametrize("name", MODELS)
def test_gradients_through_varlen_are_those_of_one_by_one(name, device, monkeypatch):
    """At most twice the error of plain, unpacked PyTorch in bfloat16, both against float64."""
    if device == "cpu":  # the kernel's place is taken by its documentation
        monkeypatch.setattr(attention, "varlen_attn", fake_varlen)
    rollouts = rollouts_of([1, 130, 5, 300, 64, 17])  # within, at and over a kernel's blocks
    rounded = {x: model_of(name, x).to(torch.bfloat16) for x in (VARLEN, "eager")}
    exact = gradients(copy.deepcopy(rounded["eager"]).double(), lambda m: one_by_one(m, rollouts))
    plain = gradients(rounded["eager"].to(device), lambda m: one_by_one(m, rollouts))
    packing_of(rounded[VARLEN].to(device))  # tried without the gradients' hooks
    found = gradients(rounded[VARLEN], lambda m: packed(m, rollouts))
    assert found.keys() == exact.keys()
    for key, gradient in found.items():
        error = (gradient - exact[key]).norm()
        one_rounding = 2**-8 * exact[key].norm()  # a key's bias has next to no gradient
        limit = 2 * (plain[key] - exact[key]).norm() + one_rounding
        assert 0 < error <= limit, (key, float(error), float(limit))


# Checkpoints on the host -----------------------------------------------------------------------


def layered_gradients(device, memory, transfers=None):
    """Three micro-batches through nine layers; nothing on the way but kernels that repeat."""
    wide = device == "cuda"  # large enough for copies to be under way while layers compute
    changes = {"hidden_size": 512, "intermediate_size": 1024} if wide else {}
    model = tiny_policy(num_hidden_layers=9, **changes).model.to(device).train()
    apply_switches(model, memory, transfers)
    with sdpa_kernel(SDPBackend.MATH):
        for lengths in ([700, 324, 1000], [2000], [1, 900, 90]):
            lengths = lengths if wide else [math.ceil(n / 50) for n in lengths]
            rollouts = rollouts_of(lengths)
            batch = pack(rollouts, range(len(rollouts)), torch.device(device))
            scalar(hidden_states(model, batch)).backward()
    return {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


@on_both
def test_checkpoints_that_wait_on_the_host_change_no_bit(device, monkeypatch):
    seen = []

    class Watched(CudaTransfers if device == "cuda" else PlainTransfers):
        def out(self, tensor):
            host, ticket = super().out(tensor)
            seen.append((tensor.device.type, host.device.type, host.is_pinned()))
            return host, ticket

    plain = MemoryConfig(attention="sequences")
    first, again = layered_gradients(device, plain), layered_gradients(device, plain)
    for name, gradient in first.items():
        assert torch.equal(gradient, again[name]), f"{name} is another in every run"
    memory = MemoryConfig(attention="sequences", checkpointing=True, offload_checkpoints=True)
    if device == "cuda":  # the switch itself takes them there
        monkeypatch.setattr(memory_switches, "CudaTransfers", Watched)
        parked = layered_gradients(device, memory)
    else:
        parked = layered_gradients(device, memory, Watched())
    assert seen == [(device, "cpu", device == "cuda")] * 27, "nine layers, three micro-batches"
    assert parked.keys() == first.keys()
    for name, gradient in first.items():
        assert torch.isfinite(gradient).all() and torch.equal(parked[name], gradient), name


# The optimiser's state on the host -------------------------------------------------------------

ADAM = {"learning_rate": 1e-3, "weight_decay": 0.01, "max_grad_norm": 1.0}


def stepped(model, state, gradients):
    """The optimiser after a step with each of the gradients, which arrive by a backward."""
    optimizer = Optimizer(model.parameters(), warmup_steps=2, state=state, **ADAM)
    for given in gradients:
        loss = sum(
            (p * g.to(p)).sum() for p, g in zip(model.parameters(), given, strict=True)
        )  # its gradient is g, to the bit
        loss.backward()
        assert optimizer.step(loss.detach())[1]
    return optimizer


def adamw_by_hand(weights, gradients):
    """Decoupled weight decay, bias correction, clipping by the whole norm; float64, lists."""
    w = [x.double() for x in weights]
    m, v = ([torch.zeros_like(x) for x in w] for _ in range(2))
    for t, given in enumerate(gradients, 1):
        rate = ADAM["learning_rate"] * min(1.0, t / 2)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in given))
        for i, g in enumerate(g.double() * min(1.0, 1.0 / norm) for g in given):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            change = (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            w[i] = w[i] * (1 - rate * ADAM["weight_decay"]) - rate * change
    return w


@on_both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_on_the_host_is_the_step_on_the_device(device, dtype):
    start = tiny_policy().model.to(device, dtype)
    g = torch.Generator().manual_seed(1)
    gradients = [
        [torch.randn(p.shape, generator=g).to(dtype) for p in start.parameters()] for _ in range(3)
    ]
    expected = adamw_by_hand([p.detach().cpu() for p in start.parameters()], gradients)
    for state in ("device", "host"):
        optimizer = stepped(copy.deepcopy(start), state, gradients)
        for weight, master, truth in zip(
            optimizer.weights, optimizer.masters, expected, strict=True
        ):
            assert weight.device.type == device and weight.grad is None and master.grad is None
            assert master.device.type == ("cpu" if state == "host" else device)
            assert torch.equal(weight.cpu(), master.detach().to(dtype).cpu())
            torch.testing.assert_close(master.cpu().double(), truth, rtol=1e-6, atol=1e-7)


# Sampling --------------------------------------------------------------------------------------


@on_both
def test_a_static_cache_samples_the_same_tokens(device):
    """On CUDA transformers compiles decoding with it."""
    policy = tiny_policy()
    policy.model.to(device)
    questions = [Question(p, p, "") for p in ("1+2=", "012+345=", "9=", "77+88=")]
    limits = {"max_prompt_tokens": 20, "max_response_tokens": 12, "stream": (0, 1)}
    growing, static = (
        sample(policy, questions, responses_per_question=8, static_cache=x, **limits)
        for x in (False, True)
    )
    assert len(set(growing.text)) > 8
    for a, b in zip(growing.tokens, static.tokens, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(growing.logprob, static.logprob, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


# The whole of it -------------------------------------------------------------------------------


@on_both
def test_two_steps_in_bfloat16(device, tmp_path, monkeypatch):
    for module in (riskpo.model.load, riskpo.run):
        monkeypatch.setattr(module, "best_device", lambda: device)
    model, data = save_arithmetic(tmp_path)
    config = TrainConfig(
        run_dir=str(tmp_path / "run"),
        model=str(model),
        data=str(data),
        algorithm="riskpo-loo",
        reward="tests.toy_reward:odd_length",
        dtype="bfloat16",
        steps=2,
        questions_per_step=10,
        responses_per_question=4,
        updates_per_step=2,
        learning_rate=1e-3,
        warmup_steps=0,
        max_response_tokens=6,
        eval_questions=4,
        eval_samples=2,
        save_every_steps=2,
        memory=MemoryConfig(checkpointing=True, offload_checkpoints=True, mlp_tile_tokens=64),
    )
    folder = train(config)
    steps = read_records(folder, "step")
    assert [r["step"] for r in steps] == [1, 2] and len(read_records(folder, "eval")) == 2
    for record in steps:
        assert all(math.isfinite(x) for x in record.values() if isinstance(x, float))
        assert record["skipped_updates"] == 0 and record["grad_norm"] > 0
        assert 0 < record["reward_mean"] < 1 and record["sampler_kl"] < 1e-3
    before = load_file(model / "model.safetensors")
    after = load_file(latest_checkpoint(folder) / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(x.dtype == torch.bfloat16 for x in after.values())
    for name, weight in after.items():
        moved = (weight.float() - before[name].bfloat16().float()).abs()
        # four steps of at most about the learning rate (Adam), and the rounding of both ends
        assert (moved <= 4 * 2e-3 + weight.float().abs() * 2**-7).all(), name
    assert any((after[n].float() != before[n].bfloat16().float()).any() for n in after)

"""A head sharded over data-parallel ranks: FSDP2 on two gloo processes, and ZeRO-3's placeholders
against a stand-in for deepspeed (trap 36)."""

import contextlib
import sys
import types

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from riskpo_kernels import full_weight, gathered_weight, linear_logprob, riskpo_loss
from tests.head_inputs import head
from tests.ranks import on_ranks

V, D, N = 61, 16, 12


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(D, D)
        self.head = torch.nn.Linear(D, V, bias=False)

    def loss(self, x, target, advantage, cu, weight=None):
        weight = self.head.weight if weight is None else weight
        hidden = self.body(x)
        return riskpo_loss(hidden, weight, target, None, advantage, cu_seqlens=cu).loss


def model():
    torch.manual_seed(1)
    return Model()


def batch(rank):
    x, _, _, target = head(N, V, D, torch.float32, "cpu", seed=rank)
    cu = torch.tensor([0, 5, N], dtype=torch.int32)
    return x, target, torch.tensor([1.0, -0.5]) * (rank + 1), cu


def unsharded(world):
    """Mean over ranks of loss and gradients, in one process."""
    whole = model()
    loss = sum(whole.loss(*batch(rank)) for rank in range(world)) / world
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in whole.named_parameters()}


def check(sharded, loss, world):
    want_loss, want = unsharded(world)
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    assert torch.allclose(loss / world, want_loss, atol=1e-6)
    for name, p in sharded.named_parameters():
        assert isinstance(p.grad, DTensor) and p.grad.placements == p.placements, name
        assert torch.allclose(p.grad.full_tensor(), want[name], atol=1e-6), name


@contextlib.contextmanager
def counted_gathers():
    counts = {"gathers": 0}
    real = DTensor.full_tensor

    def full_tensor(self, **options):
        counts["gathers"] += 1
        return real(self, **options)

    DTensor.full_tensor = full_tensor
    try:
        yield counts
    finally:
        DTensor.full_tensor = real


def inside_the_model(rank, world):
    """FSDP gathers: a method registered as a forward sees a plain weight, and full_weight lets it
    pass."""
    sharded = fully_shard(model())
    register_fsdp_forward_method(sharded, "loss")
    loss = sharded.loss(*batch(rank))
    loss.backward()
    check(sharded, loss, world)


def outside_the_model(rank, world):
    """The head is a unit of its own whose forward nobody calls: full_weight gathers it."""
    sharded = model()
    for part in (sharded.body, sharded.head):
        fully_shard(part)
    with pytest.raises(ValueError, match="full_weight"):
        sharded.loss(*batch(rank))
    with counted_gathers() as counts:
        loss = sharded.loss(*batch(rank), weight=full_weight(sharded.head.weight))
        loss.backward()
    assert counts["gathers"] == 1
    check(sharded, loss, world)


def several_backwards(rank, world):
    """Two micro-batches share one gather and one reduction."""
    sharded = model()
    for part in (sharded.body, sharded.head):
        fully_shard(part)
    x, target, advantage, cu = batch(rank)
    with counted_gathers() as counts, gathered_weight(sharded.head.weight) as weight:
        total = 0.0
        for s in range(2):
            rows = slice(*cu[s : s + 2].tolist())
            own = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
            loss = sharded.loss(x[rows], target[rows], advantage[s : s + 1], own, weight) / 2
            loss.backward()
            total = total + loss.detach()
    assert counts["gathers"] == 1
    check(sharded, total, world)


def sums_and_meshes(rank, world):
    """reduce="sum"; and a mesh whose first axis replicates (HSDP)."""
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard"))
    for reduce, share in (("sum", 1), ("mean", world)):
        part = fully_shard(torch.nn.Linear(D, V, bias=False), mesh=mesh).weight
        (full_weight(part, reduce=reduce) * (rank + 1)).sum().backward()
        want = sum(range(1, world + 1)) / share
        assert torch.equal(part.grad.full_tensor(), torch.full((V, D), want))


def every_case(rank, world):
    inside_the_model(rank, world)
    outside_the_model(rank, world)
    several_backwards(rank, world)
    sums_and_meshes(rank, world)


def test_fsdp2_gives_the_unsharded_loss_and_gradients():
    on_ranks(every_case, 2, 2)


def placeholder():
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_tensor = torch.zeros(V * D)
    return weight


def test_a_plain_weight_passes_through():
    w = torch.randn(V, D, requires_grad=True)
    assert full_weight(w) is w
    with gathered_weight(w) as inside:
        assert inside is w
    with pytest.raises(ValueError, match="one of"):
        full_weight(w, reduce="max")


def test_a_zero3_placeholder_is_a_clear_error(monkeypatch):
    h, _, _, target = head(N, V, D, torch.float32, "cpu")
    for weight in (placeholder(), torch.nn.Parameter(torch.empty(0, D))):
        with pytest.raises(ValueError, match="gathered_weight"):
            linear_logprob(h, weight, target)
    with pytest.raises(ValueError, match="gathered_weight"):
        full_weight(placeholder())
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Install deepspeed"), gathered_weight(placeholder()):
        pass


def test_zero3_is_gathered_by_deepspeed(monkeypatch):
    """Against a stand-in with deepspeed's interface: the weight is whole inside the block only."""

    @contextlib.contextmanager
    def gathered_parameters(parameters):
        (weight,) = parameters
        weight.data = weight.ds_tensor.view(V, D)
        yield
        weight.data = torch.empty(0)

    zero = types.SimpleNamespace(GatheredParameters=gathered_parameters)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    weight = placeholder()
    h, _, _, target = head(N, V, D, torch.float32, "cpu")
    with gathered_weight(weight) as whole:
        assert whole is weight
        linear_logprob(h, whole, target).logprob.sum().backward()
        assert weight.grad.shape == (V, D)
    assert weight.numel() == 0

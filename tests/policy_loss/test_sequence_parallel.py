"""Tokens of the same sequences spread over ranks: the unsharded loss, gradients and stats, with
ratios, lengths and counts of whole sequences (trap 38)."""

import itertools

import pytest
import torch
import torch.distributed as dist

from riskpo_kernels import clipped_surrogate, riskpo_loss
from tests.head_inputs import head
from tests.ranks import on_ranks
from tests.surrogate_inputs import AGGREGATES, WIDE, tokens

LENGTHS = (7, 0, 23, 1, 12)


def parts(cu, world, rank):
    """Index of this rank's tokens, and cu_seqlens of its parts: every sequence is cut in `world`
    pieces as equal as can be; the last rank has nothing of the first sequence."""
    mine, lengths = [], []
    for s, (a, b) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        cuts = [a + (b - a) * r // world for r in range(world)] + [b]
        if s == 0:
            cuts[-2] = b
        mine += range(cuts[rank], cuts[rank + 1])
        lengths.append(cuts[rank + 1] - cuts[rank])
    return torch.tensor(mine), torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def case(rank, world, ratio, aggregate, backend, masked):
    x, cu, mask = tokens(lengths=LENGTHS, dtype=torch.float64)
    options = {"ratio": ratio, "aggregate": aggregate, "constant": 40.0, "kl_coef": 0.1}
    options |= {"entropy_coef": 0.05, "dual_clip": 3.0, **WIDE[ratio]}
    index, own_cu = parts(cu, world, rank)
    results = []
    for local in (False, True):
        y = {k: v[index] if local and len(v) == cu[-1] else v for k, v in x.items()}
        y = {k: v.clone() for k, v in y.items()}
        leaves = [y["logprob"].requires_grad_(), y["entropy"].requires_grad_()]
        where = dict(cu_seqlens=own_cu if local else cu)
        if masked:
            where["mask"] = mask[index] if local else mask
        if local:
            where["sequence_group"] = dist.group.WORLD
        which = backend if local else "reference"
        loss, stats = clipped_surrogate(**y, **options, **where, backend=which)
        gradients = torch.autograd.grad(loss, leaves)
        if local:
            dist.all_reduce(loss.detach_())
        else:
            gradients = [g[index] for g in gradients]
        results.append({"loss": loss, "dlogprob": gradients[0], "dentropy": gradients[1]} | stats)
    want, got = results
    assert want.keys() == got.keys()
    for name in want:
        assert torch.allclose(got[name].double(), want[name].double(), atol=1e-12), name


def a_rank_without_tokens(rank, world):
    """It takes part in every collective; the others' numbers are the unsharded ones."""
    x, cu, _ = tokens(lengths=LENGTHS, dtype=torch.float64)
    x = {k: x[k] for k in ("logprob", "old_logprob", "advantage")}
    whole = clipped_surrogate(**x, cu_seqlens=cu, backend="reference").loss
    if rank:
        x |= {k: x[k][:0] for k in ("logprob", "old_logprob")}
        cu = torch.zeros_like(cu)
    for backend in ("auto", "reference"):
        loss, stats = clipped_surrogate(
            **x, cu_seqlens=cu, sequence_group=dist.group.WORLD, backend=backend
        )
        dist.all_reduce(loss)
        assert torch.allclose(loss, whole) and stats["tokens"] == sum(LENGTHS)


def through_the_head(rank, world):
    """riskpo_loss: dH of this rank's tokens, dW as the sum over ranks."""
    n = sum(LENGTHS)
    h, w, _, target = head(n, 50, 8, torch.float64, "cpu")
    x, cu, _ = tokens(lengths=LENGTHS, dtype=torch.float64)
    index, own_cu = parts(cu, world, rank)
    advantage = x["advantage"]
    results = []
    for i, bounds, group in ((slice(None), cu, None), (index, own_cu, dist.group.WORLD)):
        hh, ww = h[i].clone().requires_grad_(), w.clone().requires_grad_()
        old = torch.full_like(target[i], -3.0, dtype=torch.float64)
        options = dict(cu_seqlens=bounds, clip_low=3.0, clip_high=9.0, sequence_group=group)
        loss, _ = riskpo_loss(hh, ww, target[i], old, advantage, **options)
        loss.backward()
        results.append((hh.grad[index if group is None else slice(None)], ww.grad))
    dist.all_reduce(results[1][1])
    for want, got in zip(*results, strict=True):
        assert torch.allclose(got, want, atol=1e-12) and want.norm() > 1e-3


def refusals(rank, world):
    x, cu, _ = tokens(lengths=LENGTHS)
    x = {k: x[k] for k in ("logprob", "old_logprob", "advantage")}
    group = dist.group.WORLD
    if rank:  # one sequence fewer than the other rank has
        x, cu, _ = tokens(lengths=LENGTHS[:-1])
        x = {k: x[k] for k in ("logprob", "old_logprob", "advantage")}
    with pytest.raises(ValueError, match=r"sequences = \[5, 4\] by rank"):
        clipped_surrogate(**x, cu_seqlens=cu, sequence_group=group)


def a_denominator_of_0_on_one_rank(rank, world):
    """It counts as 1 there, number or tensor: no error that would leave the others waiting."""
    x, cu, mask = tokens(lengths=LENGTHS, dtype=torch.float64)
    x = {k: x[k] for k in ("logprob", "old_logprob", "advantage")}
    words = {"cu_seqlens": cu, "mask": mask if rank == 0 else mask & False}
    for backend in ("torch", "reference"):
        for zero in (0, torch.tensor(0)):
            own = words | {"denominator": zero if rank else 3, "backend": backend}
            loss, stats = clipped_surrogate(**x, **own, sequence_group=dist.group.WORLD)
            alone = clipped_surrogate(**x, **words, denominator=3, backend="reference")
            assert torch.allclose(loss, alone.loss) and stats["tokens"] == mask.sum()
            assert bool(loss) == (rank == 0)


def as_many_sequences_as_tokens_on_one_rank(rank, world):
    """The word that is then needed is asked for on every rank, and nobody waits."""
    x, cu, _ = tokens(lengths=(3, 2, 2), dtype=torch.float64)
    index = torch.tensor([[0, 3, 4], [1, 2, 5, 6]][rank])
    own_cu = torch.tensor([[0, 1, 3, 3], [0, 2, 2, 4]][rank])
    whole = {k: x[k] for k in ("logprob", "old_logprob", "advantage")}
    local = {k: v if k == "advantage" else v[index] for k, v in whole.items()}
    words = {"ratio": "token", "sequence_group": dist.group.WORLD, "cu_seqlens": own_cu}
    expected = clipped_surrogate(**whole, cu_seqlens=cu, ratio="token", backend="reference").loss
    for backend in ("torch", "reference"):
        words["backend"] = backend
        with pytest.raises(ValueError, match="advantage_per="):
            clipped_surrogate(**local, **words)
        loss = clipped_surrogate(**local, **words, advantage_per="sequence").loss
        dist.all_reduce(loss)
        assert torch.allclose(loss, expected)


def every_case(rank, world):
    for choice in itertools.product(WIDE, AGGREGATES, ("torch", "reference"), (False, True)):
        try:
            case(rank, world, *choice)
        except AssertionError as error:
            raise AssertionError(f"{choice}: {error}") from error
    a_rank_without_tokens(rank, world)
    through_the_head(rank, world)
    a_denominator_of_0_on_one_rank(rank, world)
    as_many_sequences_as_tokens_on_one_rank(rank, world)
    refusals(rank, world)


def test_sharded_tokens_give_the_unsharded_loss():
    on_ranks(every_case, 2, 2)

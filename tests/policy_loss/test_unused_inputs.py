"""What has coefficient 0 is not read, what is used and NaN is seen: the same on every backend.

Every input of clipped_surrogate, every way in which it can be without weight, every backend.
"""

import pytest
import torch

from riskpo_kernels import clipped_surrogate
from tests.surrogate_inputs import ALL, BACKENDS, WIDE, padded, run, tokens

LENGTHS = (3, 0, 4, 2)
NAN, INF = float("nan"), float("inf")
MASKED = 3  # a sequence of which no token counts
PLAIN = {"kl_coef": 0.1, "entropy_coef": 0.05}
OFF = {"kl_coef": 0.0, "entropy_coef": 0.0}


def problem(device, per_token=False):
    x, cu, _ = tokens(device, lengths=LENGTHS)
    n = len(x["logprob"])
    segment = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)).to(device)
    mask = (torch.arange(n, device=device) % 4 != 1) & (segment != MASKED)
    if per_token:
        x["advantage"], x["correction"] = x["advantage"][segment], x["correction"][segment]
    return x, cu, mask, segment


def with_nan(x, name, where, value=NAN):
    return x | {name: torch.where(where, value, x[name])}


def unused(device, ratio):
    """(what, clean inputs, poisoned inputs, mask, options): the poison has no weight."""
    x, cu, mask, segment = problem(device)
    each, *_ = problem(device, per_token=True)
    some = torch.arange(len(mask), device=device) % 3 == 0
    empty = torch.tensor(LENGTHS, device=device) == 0
    empty[MASKED] = True
    for kl in ("k1", "k2", "k3"):
        for value in (NAN, INF, -INF):
            options = {"kl_coef": 0.0, "entropy_coef": 0.05, "kl": kl}
            yield "kl_coef = 0", x, with_nan(x, "ref_logprob", some, value), mask, options
    for value in (NAN, INF):
        options = {"kl_coef": 0.1, "entropy_coef": 0.0}
        yield "entropy_coef = 0", x, with_nan(x, "entropy", some, value), mask, options
    for name in ("logprob", "old_logprob", "ref_logprob", "entropy"):
        yield f"masked {name}", x, with_nan(x, name, ~mask), mask, PLAIN
    for name in ("advantage", "correction"):
        yield f"{name} without tokens", x, with_nan(x, name, empty), mask, PLAIN
        if ratio == "token" or name == "correction":
            y = x | {name: each[name]}
            yield f"masked {name}", y, with_nan(y, name, ~mask), mask, PLAIN
    for name in ("advantage", "correction"):
        other = "correction" if name == "advantage" else "advantage"
        none = torch.arange(len(LENGTHS), device=device) == 2
        y = x | {name: torch.where(none, 0.0, x[name])}
        for value in (NAN, INF):
            yield f"{other} beside {name} = 0", y, with_nan(y, other, none, value), mask, PLAIN
        for poisoned in ("logprob", "old_logprob"):
            bad = with_nan(y, poisoned, some & none[segment])
            yield f"{poisoned} where {name} = 0", y, bad, mask, OFF
        if ratio == "token":
            y = each | {name: torch.where(some, 0.0, each[name])}
            yield f"token {other} beside {name} = 0", y, with_nan(y, other, some), mask, PLAIN
            yield f"old where token {name} = 0", y, with_nan(y, "old_logprob", some), mask, PLAIN


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_what_has_no_weight_is_not_read(backend, ratio, device):
    _, cu, _, _ = problem(device)
    words = {"cu_seqlens": cu, "ratio": ratio, **WIDE[ratio]}
    cases = list(unused(device, ratio))
    assert len(cases) == (26 if ratio == "sequence" else 31)
    for what, clean, poisoned, mask, options in cases:
        options = words | {"mask": mask} | options
        got = run(poisoned, backend=backend, **options)
        expected = run(clean, backend=backend, **options)
        for name in ("loss", "dlogprob", "dentropy", "clip_fraction", "zero_coefficient_fraction"):
            assert name not in got or torch.equal(got[name], expected[name]), (what, name)
        truth = run(poisoned, backend="reference", **options)
        for name, value in got.items():
            finite = name == "entropy" or not value.isnan().any()  # an infinite entropy's mean
            assert finite and torch.allclose(value, truth[name], atol=2e-6), (what, name, value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_nan_that_is_used_is_seen_alike(backend, ratio, device):
    x, cu, mask, segment = problem(device)
    token = torch.arange(len(mask), device=device) == 4  # counts, in sequence 2
    sequence = torch.arange(len(LENGTHS), device=device) == 2
    assert mask[4] and segment[4] == 2
    for kl in ("k1", "k2", "k3"):
        for name in x if kl == "k3" else ("ref_logprob",):
            bad = with_nan(x, name, sequence if len(x[name]) == len(LENGTHS) else token)
            options = {"cu_seqlens": cu, "mask": mask, "ratio": ratio, "kl": kl, **PLAIN}
            truth = run(bad, backend="reference", **options)
            got = run(bad, backend=backend, **options)
            assert got["loss"].isnan(), (kl, name)
            for key, value in truth.items():
                same = torch.allclose(got[key], value, atol=2e-6, equal_nan=True)
                assert same, (kl, name, key, got[key], value)


@pytest.mark.parametrize("backend", ALL)
def test_the_case_of_the_report(backend, device):
    """kl_coef=0 beside a reference log-prob that is missing."""
    lp = torch.tensor([-1.0, -1.5, -2.0], device=device)
    x = {"logprob": lp, "old_logprob": lp, "advantage": torch.ones(3, device=device)}
    x["ref_logprob"] = torch.tensor([-1.1, NAN, -2.0], device=device)
    got = run(x, ratio="token", aggregate="token-mean", backend=backend)
    assert got["loss"] == -1 and torch.allclose(got["dlogprob"], torch.full_like(lp, -1 / 3))
    u = (x["ref_logprob"] - lp)[0].double()
    assert abs(got["kl"].item() - ((u.expm1() - u) / 2).item()) < 1e-9, "of the two that have one"


@pytest.mark.parametrize("backend", ALL)
def test_as_many_sequences_as_tokens_need_a_word(backend, device):
    lp = torch.tensor([-1.0, -1.0, -1.0, -1.0], device=device)
    a = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    cu = torch.tensor([0, 2, 2, 3, 4], device=device)
    words = {"cu_seqlens": cu, "ratio": "token", "aggregate": "token-mean", "backend": backend}
    for name, x in (("advantage", {"advantage": a}), ("correction", {"correction": a})):
        x = {"logprob": lp, "old_logprob": lp, "advantage": a[:1].expand(4)} | x
        given = {} if name == "advantage" else {"advantage_per": "token"}
        with pytest.raises(ValueError, match=f"{name}_per='sequence' or {name}_per='token'"):
            clipped_surrogate(**x, **words, **given)
        losses = {"token": -2.5, "sequence": -2.25}
        for per, loss in losses.items():
            got = run(x, **words, **given, **{f"{name}_per": per})
            assert got["loss"] == loss, (name, per)
            ends = torch.arange(5, device=device)  # every sequence is one token: both readings
            assert run(x, **words | {"cu_seqlens": ends})["loss"] == -2.5
    x = {"logprob": lp, "old_logprob": lp, "advantage": a, "correction": a}
    ours = {"cu_seqlens": cu, "backend": backend}
    with pytest.raises(ValueError, match="correction_per"):
        clipped_surrogate(**x, **ours)  # the advantage of a sequence ratio can only be per sequence
    assert run(x, **ours, correction_per="sequence")["loss"] == -(1 + 0 * 4 + 9 + 16) / 4
    assert run(x, **ours, correction_per="token")["loss"] == -(1 * 1.5 + 3 * 3 + 4 * 4) / 4


def test_a_word_that_does_not_fit_is_refused():
    x, cu, _ = tokens(lengths=(3, 2))
    names = {n: x[n] for n in ("logprob", "old_logprob", "advantage")}
    with pytest.raises(ValueError, match=r"expected \[5\]"):
        clipped_surrogate(**names, cu_seqlens=cu, ratio="token", advantage_per="token")
    with pytest.raises(ValueError, match="ratio='token'"):
        clipped_surrogate(**names, cu_seqlens=cu, advantage_per="token")
    with pytest.raises(ValueError, match="advantage_per='response'"):
        clipped_surrogate(**names, cu_seqlens=cu, advantage_per="response")
    flat = names | {"advantage": torch.ones(5)}
    with pytest.raises(ValueError, match="by cu_seqlens or a mask"):
        words = {"ratio": "token", "aggregate": "token-mean", "advantage_per": "sequence"}
        clipped_surrogate(**flat, **words)
    square = {n: padded(v, cu) for n, v in names.items() if n != "advantage"}
    mask = padded(torch.ones(5), cu, fill=0.0)
    square = {n: v[:, :2].nan_to_num() for n, v in square.items()}  # [2, 2]: rows or columns?
    words = {"mask": mask[:, :2], "ratio": "token"}
    got = [
        clipped_surrogate(**square, advantage=a, **words).loss
        for a in (x["advantage"], x["advantage"][:, None].expand(2, 2))
    ]
    assert torch.equal(*got), "[B] is per sequence, [B, T] per token"


@pytest.mark.parametrize("backend", ALL)
def test_a_denominator_of_0_counts_as_1(backend, device):
    x, cu, mask = tokens(device, lengths=LENGTHS)
    words = {"cu_seqlens": cu, "mask": mask, "backend": backend, **PLAIN}
    one = run(x, denominator=1, **words)
    kinds = torch.float32, torch.float64, torch.int32, torch.int64
    for zero in (0, 0.0, -0.0, *(torch.zeros((), dtype=kind, device=device) for kind in kinds)):
        got = run(x, denominator=zero, **words)
        assert all(torch.equal(got[name], one[name]) for name in one), zero
    with pytest.raises(ValueError, match="denominator=-1"):
        clipped_surrogate(**x, denominator=-1, **words)
    below = torch.tensor(-1.0, device=device)
    assert run(x, denominator=below, **words)["loss"].isnan(), "seen, without waiting for it"

"""clipped_surrogate: identities, masks, extremes, errors at the door, bounded compilation."""

import pytest
import torch

from riskpo_kernels import clipped_surrogate
from tests.surrogate_inputs import AGGREGATES, ALL, BACKENDS, WIDE, padded, run, tokens

FULL = {"dual_clip": 1.2, "kl_coef": 0.1, "entropy_coef": 0.05, "constant": 50.0}
NAN, INF = float("nan"), float("inf")


def same(got, expected, atol=2e-6):
    for name in expected:
        torch.testing.assert_close(
            got[name].double(), expected[name].double(), atol=atol, rtol=2e-6, msg=lambda m: m
        )


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_packed_equals_padded(backend, ratio, device):
    x, cu, mask = tokens(device)
    options = FULL | WIDE[ratio] | {"ratio": ratio, "backend": backend}
    packed = run(x, cu_seqlens=cu, mask=mask, **options)
    names = ("dlogprob", "dentropy")
    for left in (False, True):
        rows = {n: v if len(v) == len(cu) - 1 else padded(v, cu, left=left) for n, v in x.items()}
        rows_mask = padded(mask.float(), cu, left=left, fill=0.0)
        got = run(rows, mask=rows_mask.int(), **options)
        expected = packed | {n: padded(packed[n], cu, left=left, fill=0.0) for n in names}
        same(got, expected)
        assert all((got[n][rows_mask == 0] == 0).all() for n in names)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("ratio", ["sequence", "token"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF, 60.0])
def test_masked_tokens_never_count(backend, ratio, poison, device):
    x, cu, mask = tokens(device)
    options = FULL | WIDE[ratio] | {"cu_seqlens": cu, "ratio": ratio, "backend": backend}
    clean = run(x, mask=mask, **options)
    for name in ("old_logprob", "ref_logprob", "entropy", "logprob"):
        bad = torch.where(mask, x[name], x[name] - poison)
        got = run(x | {name: bad}, mask=mask, **options)
        for key in clean:
            assert torch.equal(got[key], clean[key]), (name, key)
    assert (clean["dlogprob"][~mask] == 0).all() and (clean["dentropy"][~mask] == 0).all()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_micro_batches_add_up(backend, aggregate, ratio, device):
    x, cu, mask = tokens(device)
    options = FULL | WIDE[ratio] | {"ratio": ratio, "aggregate": aggregate, "backend": backend}
    whole = run(x, cu_seqlens=cu, mask=mask, **options)
    s = len(cu) - 1
    counts = {"token-mean": int(mask.sum()), "sequence-sum-norm": s * 50.0}
    total = torch.tensor(counts.get(aggregate, s), device=device)
    parts = []
    for a, b in ((0, 3), (3, 4), (4, 11), (11, s)):
        first, last = int(cu[a]), int(cu[b])
        part = {n: v[a:b] if len(v) == s else v[first:last] for n, v in x.items()}
        where = {"cu_seqlens": cu[a : b + 1] - cu[a], "mask": mask[first:last]}
        denominator = total if a else float(total)
        parts.append(run(part, denominator=denominator, **where, **options))
    torch.testing.assert_close(sum(p["loss"] for p in parts), whole["loss"])
    for name in ("dlogprob", "dentropy"):
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), whole[name])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_extreme_ratios(backend, ratio, device):
    cu = torch.tensor([0, 2, 4, 6, 8], device=device)
    old = torch.tensor([-1.0, -1, -INF, -1, -90, -90, -1, -1], device=device)
    new = torch.tensor([-1.0, -1, -1, -1, -1, -1, -90, -90], device=device)
    a = torch.tensor([1.0, -1, -1, 1], device=device)
    x = {"logprob": new, "old_logprob": old, "advantage": a}
    got = run(x, cu_seqlens=cu, ratio=ratio, backend=backend)
    assert all(torch.isfinite(v).all() for v in got.values())
    assert (got["dlogprob"][4:] == 0).all(), "beyond the clamp the slope is 0"
    assert got["dlogprob"][2] == 0 and (got["dlogprob"][:2] != 0).all()
    bound = 10.0 if ratio == "sequence" else 20.0
    assert abs(got["ratio_max"].log().item() - bound) < 1e-5
    for kl in ("k1", "k2", "k3"):
        far = run(x | {"ref_logprob": old}, cu_seqlens=cu, kl=kl, kl_coef=0.1, backend=backend)
        assert all(torch.isfinite(v).all() for v in far.values())
        assert (far["dlogprob"][4:] == 0).all()


@pytest.mark.parametrize("backend", ALL)
def test_nan_that_counts_is_seen(backend, device):
    x, cu, mask = tokens(device)
    x["logprob"][5], mask[4:6] = NAN, torch.tensor([False, True], device=device)
    x["logprob"].requires_grad_()
    for ratio in ("sequence", "token"):
        where = {"cu_seqlens": cu, "mask": mask, "ratio": ratio}
        loss, _ = clipped_surrogate(**x, **where, backend=backend)
        (gradient,) = torch.autograd.grad(loss, x["logprob"])
        assert loss.isnan() and gradient[5].isnan()
        assert torch.isfinite(gradient[7:]).all(), "other sequences"
        assert backend == "reference" or gradient[4] == 0, "a masked token of the same sequence"


@pytest.mark.parametrize("backend", ALL)
def test_nothing_to_count(backend, device):
    x, cu, mask = tokens(device)
    for ratio in ("sequence", "token"):
        for aggregate in AGGREGATES:
            options = FULL | {"ratio": ratio, "aggregate": aggregate, "backend": backend}
            got = run(x, cu_seqlens=cu, mask=mask & False, **options)
            assert all((v == 0).all() for v in got.values()), got
            none = torch.tensor(0, device=device)
            got = run(x, cu_seqlens=cu, mask=mask & False, denominator=none, **options)
            assert all((v == 0).all() for v in got.values()), got
            for cu_empty in ([0], [0, 0, 0]):
                bounds = torch.tensor(cu_empty, device=device)
                s = len(cu_empty) - 1
                empty = {n: v[: s if len(v) == len(cu) - 1 else 0] for n, v in x.items()}
                got = run(empty, cu_seqlens=bounds, **options)
                assert all((v == 0).all() for v in got.values()), got
    grid = torch.zeros(3, 0, device=device, requires_grad=True)
    loss, _ = clipped_surrogate(
        grid, grid.detach(), torch.ones(3, device=device), mask=grid.detach()
    )
    loss.backward()
    assert loss == 0 and grid.grad.shape == (3, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_masks_and_integers(backend, device):
    x, cu, mask = tokens(device)
    options = FULL | {"ratio": "token", "backend": backend}
    expected = run(x, cu_seqlens=cu, mask=mask, **options)
    strided = {n: torch.stack((v, v * NAN), 1)[:, 0] for n, v in x.items()}
    out = clipped_surrogate(
        **strided,
        cu_seqlens=torch.stack((cu, cu), 1)[:, 0].long(),
        mask=torch.stack((mask, mask), 1)[:, 0],
        **options,
    )
    torch.testing.assert_close(out.loss, expected["loss"], rtol=0, atol=0)
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        same(run(x, cu_seqlens=cu, mask=mask.to(dtype), **options), expected, atol=0)
    one = torch.full((1,), -1.0, device=device)
    wide = one.expand(len(mask))  # stride 0
    got = run(x | {"old_logprob": wide.clone()}, cu_seqlens=cu, mask=mask, **options)
    loss, _ = clipped_surrogate(**x | {"old_logprob": wide}, cu_seqlens=cu, mask=mask, **options)
    assert torch.equal(loss, got["loss"])
    ints = options | {"clip_low": 0, "clip_high": 1, "dual_clip": 3, "kl_coef": 1}
    floats = options | {"clip_low": 0.0, "clip_high": 1.0, "dual_clip": 3.0, "kl_coef": 1.0}
    same(run(x, cu_seqlens=cu, **ints), run(x, cu_seqlens=cu, **floats), atol=0)


@pytest.mark.parametrize("backend", ALL)
def test_upstream_and_second_backward(backend, device):
    x, cu, _ = tokens(device)
    options = FULL | WIDE["sequence"] | {"cu_seqlens": cu, "backend": backend}
    one, scaled = run(x, **options), run(x, upstream=65536.0, **options)
    for name in ("dlogprob", "dentropy"):
        torch.testing.assert_close(scaled[name], one[name] * 65536.0)
    leaf = x["logprob"].clone().requires_grad_()
    loss, _ = clipped_surrogate(**x | {"logprob": leaf}, **options)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * one["dlogprob"])
    again = run(x, **options)
    assert all(torch.equal(again[name], one[name]) for name in one), "two runs differ"


@pytest.mark.parametrize("backend", ALL)
def test_entropy_bonus_scale_and_absent_inputs(backend, device):
    x, cu, mask = tokens(device)
    n, s = int(mask.sum()), len(cu) - 1
    weights = {"token-mean": 1 / n, "sequence-sum": 1 / s, "sequence-sum-norm": 1 / (50 * s)}
    where = {"cu_seqlens": cu, "mask": mask, "backend": backend}
    for aggregate, weight in weights.items():
        got = run(x, aggregate=aggregate, **FULL, **where)
        torch.testing.assert_close(got["dentropy"], torch.where(mask, -0.05 * weight, 0.0))
    assert got["zero_coefficient_fraction"] == 0
    x["entropy"].requires_grad_()
    loss, stats = clipped_surrogate(**x, **where)
    assert not loss.requires_grad and stats.keys() >= {"kl", "entropy"}, "coefficients are 0"
    for name in ("entropy", "ref_logprob", "correction"):
        del x[name]
    stats = clipped_surrogate(**x, **where).stats
    assert not stats.keys() & {"kl", "entropy"}


def refused(match, x=None, **changes):
    base, cu, _ = tokens()
    arguments = base | {"cu_seqlens": cu} | (x or {}) | changes
    with pytest.raises(ValueError, match=match) as error:
        clipped_surrogate(**arguments)
    assert "got" in str(error.value) and "expected" in str(error.value)


def test_errors_at_the_door():
    x, cu, mask = tokens()
    n, s = len(mask), len(cu) - 1
    grid = torch.zeros(2, 3)
    refused("logprob = int64", logprob=torch.zeros(n, dtype=torch.int64))
    refused("logprob of shape", logprob=torch.zeros(1, 1, n))
    refused("old_logprob of shape", old_logprob=torch.zeros(n - 1))
    refused("ref_logprob of shape", ref_logprob=torch.zeros(n, 1))
    refused("entropy = int32", entropy=torch.zeros(n, dtype=torch.int32))
    refused("advantage = int64", advantage=torch.ones(s, dtype=torch.int64))
    refused("requires grad", advantage=torch.ones(s, requires_grad=True))
    refused("Only ratio='token'", advantage=torch.ones(n))
    refused("advantage of shape", advantage=torch.ones(s + 1), ratio="token")
    refused("correction of shape", correction=torch.ones(s - 1))
    refused("mask of shape", mask=torch.ones(n + 1))
    refused("bool, int or float", mask=torch.ones(n, dtype=torch.complex64))
    refused("int32 or int64", cu_seqlens=cu.float())
    refused("int32 or int64", cu_seqlens=cu[:0])
    refused("start at 0", cu_seqlens=cu + 1)
    short = cu.clone()
    short[-1] -= 1
    refused("ending at", cu_seqlens=short)
    falling = cu.clone()
    falling[2], falling[3] = cu[3], cu[2]
    refused("falling", cu_seqlens=falling)
    refused("without cu_seqlens", cu_seqlens=None)
    refused("without cu_seqlens", cu_seqlens=None, ratio="token", aggregate="sequence-sum")
    refused("with padded", logprob=grid, old_logprob=grid)
    refused("without a mask", logprob=grid, old_logprob=grid, cu_seqlens=None)
    refused("one device", advantage=torch.ones(s, device="meta"))
    refused("ratio=", ratio="geometric")
    refused("aggregate=", aggregate="mean")
    refused("kl=", kl="k4")
    refused("loss=", loss="ppo")
    refused("tau_neg with loss='clip'", loss_options={"tau_neg": 1.0})
    refused("dual_clip with loss='sapo'", loss="sapo", dual_clip=3.0)
    refused("tau_pos=0", loss="sapo", loss_options={"tau_pos": 0})
    refused("ratio='token' with loss='gmpo'", loss="gmpo", ratio="token")
    refused("off_policy_mask_threshold=inf", off_policy_mask_threshold=INF)
    bare = {"cu_seqlens": None, "ratio": "token", "aggregate": "token-mean"}
    refused("off_policy_mask_threshold on flat", off_policy_mask_threshold=0.5, **bare)
    refused("aggregate='prompt-mean' alone", aggregate="prompt-mean")
    refused("prompt_tokens of shape", aggregate="prompt-mean", prompt_tokens=torch.ones(n))
    refused("clip_low", clip_low=-0.1)
    refused("clip_high", clip_high=INF)
    refused("dual_clip", dual_clip=1.0)
    refused("kl_coef", kl_coef=-1.0)
    refused("kl_coef=0.1 without", kl_coef=0.1, ref_logprob=None)
    refused("entropy_coef=0.1 without", entropy_coef=0.1, entropy=None)
    refused("entropy_coef", entropy_coef=NAN)
    refused("constant or denominator", aggregate="sequence-sum-norm")
    refused("denominator", denominator=-1)
    refused("0-d tensor", denominator=torch.ones(1))
    refused("backend=", backend="cuda")

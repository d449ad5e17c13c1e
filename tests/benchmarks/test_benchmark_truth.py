"""What the benchmarks call an error, a masked row and a dtype."""

import functools

import pytest
import torch

from benchmarks import bench_linear_logprob, harness, table, truth
from riskpo_kernels import reference
from tests.benchmarks.test_benchmarks import TINY


def head_inputs(**sizes):
    given = bench_linear_logprob.inputs(**TINY | sizes)
    given.pop("_facts")
    return given


def test_a_wrong_gradient_shows_in_the_errors():
    exact = truth.Head(head_inputs())
    good = bench_linear_logprob.providers()["plain"]

    def wrong(**x):
        out = good.run(**x)
        x["weight"].grad[3:5] *= 1.5
        return out[0] + 0.01, out[1]

    assert exact.errors(good.run, True)["gradient_error"] < 1e-5
    found = exact.errors(wrong, True)
    assert found["gradient_error"] > 1e-3 and found["logprob_error_nats"] > 5e-3


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("masked", [0.0, 0.5])
def test_the_truth_is_what_autograd_finds_in_float64(masked, sampled, monkeypatch):
    """In chunks of a few rows; of all gradients or of some, dW summed over all tokens even so."""
    monkeypatch.setitem(truth.CHUNK, "cpu", 5 * TINY["v"])
    monkeypatch.setitem(truth.GRADIENTS, "cpu", 20 * TINY["v"] if sampled else 2**30)
    given = head_inputs(masked_fraction=masked, phase="forward+backward with entropy")
    exact = truth.Head(given)
    assert (exact.errors_over == "everything") != sampled
    h, w = (given[k].detach().double().requires_grad_() for k in ("hidden", "weight"))
    out = reference.linear_logprob(h, w, given["target"], return_entropy=True)
    kept = exact.kept
    assert kept.numel() == 64 * (1 - masked)
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    close(exact.forward.logprob, out.logprob[kept].detach())
    close(exact.forward.entropy, out.entropy[kept].detach())
    sent = (out.logprob * given["c"] + out.entropy * given["g"]).sum()
    for total, found in ((sent, exact.per_token), (-out.logprob.sum() / len(kept), exact.mean)):
        dh, dw = torch.autograd.grad(total, (h, w), retain_graph=True)
        close(found[0], dh[kept[exact.rows]])
        close(found[1], dw[exact.some.ids])
    if sampled:
        assert exact.rows.numel() < len(kept) and exact.some.ids.unique().numel() < TINY["v"]
        assert exact.target.mode().values in exact.some.ids  # the largest sum of all


@pytest.mark.usefixtures("recomputed")
def test_masked_rows_cost_nobody_anything():
    """Ours gets the mask, the others what is left of the rows; both return zeros for the rest."""
    settings = harness.Settings(seconds_per_row=0)
    sizes = TINY | {"zero_fraction": 0.0, "masked_fraction": 0.5}
    rows = list(harness.run_case(bench_linear_logprob, "one", sizes, settings, ("riskpo", "plain")))
    done = {r["provider"]: r for r in table.measured(rows)}
    assert {"riskpo_kernels", "plain"} <= done.keys()
    assert done["riskpo_kernels"]["units"] == pytest.approx((2 + 6) / 2)
    assert done["plain"]["units"] == (2 + 4) / 2
    assert all(r["gradient_error"] < 1e-3 and r["logprob_error_nats"] < 1e-4 for r in done.values())
    assert "50% of the rows masked" in table.regime_line(done["plain"])
    given = head_inputs(masked_fraction=0.5)
    logprob, _ = bench_linear_logprob.providers()["plain"].run(**given)
    masked = given["target"] == -100
    assert (logprob[masked] == 0).all() and (logprob[~masked] < 0).all()
    assert (given["hidden"].grad[masked] == 0).all()


def test_dtypes_stand_beside_the_numbers():
    settings = harness.Settings(seconds_per_row=0)
    sizes = TINY | {"dtype": "bfloat16"}
    rows = list(harness.run_case(bench_linear_logprob, "one", sizes, settings, ("riskpo", "plain")))
    done = {r["provider"]: r for r in table.measured(rows)}
    for row in done.values():
        assert row["gradients_in"] == "dH bfloat16, dW bfloat16"
    assert "returned dH bfloat16, dW bfloat16" in table.regime_line(done["plain"])
    text = table.markdown(rows)
    assert "| fp32, fp32 |" in text and "| bf16, one product |" in text

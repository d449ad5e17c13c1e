"""Rows without a coefficient leave the backward; whatever gives them one keeps them (trap 34)."""

import pytest
import torch

from riskpo_kernels import reference, riskpo_loss
from riskpo_kernels.work import counting
from tests.compare import assert_close_as_plain
from tests.head_inputs import head


@pytest.mark.usefixtures("recomputed")
@pytest.mark.parametrize("terms", [{}, {"entropy_coef": 0.02}, {"kl_coef": 0.1}], ids=str)
def test_skipped_rows_change_no_gradient(terms, device):
    """Half of the sequences have no advantage: gradients are the reference's, which skips nothing;
    an entropy or KL term gives every row a gradient, and then none is skipped."""
    h, w, _, target = head(40, 300, 16, torch.float32, device, bias=False)
    cu = torch.arange(0, 41, 10, dtype=torch.int32, device=device)
    advantage = torch.tensor([0.0, -1.0, 0.0, -0.5], device=device)
    old = reference.linear_logprob(h, w, target).logprob
    options = {"cu_seqlens": cu, "clip_low": 0.5, "clip_high": 0.5, **terms}
    ref = old + 0.1 * torch.randn(40, device=device) if "kl_coef" in terms else None

    def gradients(op, dtype, **more):
        hh, ww = (x.to(dtype).requires_grad_() for x in (h.clone(), w.clone()))
        given = (old.to(dtype), advantage.to(dtype))
        reference_policy = None if ref is None else ref.to(dtype)
        with counting() as work:
            op(hh, ww, target, *given, ref_logprob=reference_policy, **options, **more)[
                0
            ].backward()
        return hh.grad, ww.grad, 2 * work.multiply_adds / (40 * 300 * 16)

    truth = gradients(reference.riskpo_loss, torch.float64)
    plain = gradients(reference.riskpo_loss, torch.float32)
    got = gradients(riskpo_loss, torch.float32, backend="torch")
    for i, name in enumerate(("dH", "dW")):
        assert_close_as_plain(name, got[i], truth[i], plain[i])
    silent = torch.arange(40, device=device) // 10 % 2 == 0
    assert (got[0][silent] == 0).all() == (not terms)
    assert got[2] == pytest.approx(8.0 if terms else 5.0), "units executed"

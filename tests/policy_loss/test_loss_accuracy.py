"""The formulas of the losses where they cancel: within the limits that docs/accuracy.md shows."""

from pathlib import Path

import pytest
import torch

from riskpo_kernels.policy_loss import formulas
from tests.surrogate_inputs import ALL
from tools import loss_accuracy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "accuracy.md"


@pytest.mark.parametrize("backend", ALL)
def test_every_row_keeps_its_limit(backend):
    rows = loss_accuracy.all_rows(backend)
    assert len(rows) == 17
    for row in rows:
        assert row.errors()[1] <= row.limit, (row.name, row.point, row.errors())


def test_the_textbook_lines_would_be_noticed():
    beyond = {r.name for r in loss_accuracy.all_rows() if r.errors()[0] > r.limit}
    assert beyond >= {"k3", "slope of k3", "group advantage", "pass@k"}


def test_the_page_shows_every_row():
    page = PAGE.read_text(encoding="utf-8")
    for row in loss_accuracy.all_rows():
        assert f"| {row.name} | {row.point} |" in page, (row.name, row.point)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 4e-7), (torch.float64, 1e-9)])
def test_k3_is_smooth_and_never_negative(dtype, limit):
    """Over thirty powers of two, across the seam at 1, against expm1 in float64."""
    size = torch.logspace(-26, 4.3, 4001, base=2.0, dtype=torch.float64)
    u = torch.cat((size, -size)).to(dtype)
    value, slope = formulas.k3(u, torch.full_like(u, -1.0), None)
    exact = torch.expm1(u.double())
    assert (value >= 0).all()
    far = u.double().abs() > 1e-3  # nearer the difference with u loses digits even in float64
    truth = torch.where(far, exact - u.double(), u.double() ** 2 * (0.5 + u.double() / 6))
    limit = max(limit, 1e-6 if dtype == torch.float64 else limit)
    torch.testing.assert_close(value.double(), truth, rtol=limit, atol=0)
    torch.testing.assert_close(slope.double(), -exact, rtol=min(limit, 4e-7), atol=0)

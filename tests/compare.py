"""The one rule of tolerance (riskpo/doctor/tolerance.py) as assertions."""

from __future__ import annotations

import torch

from riskpo.doctor.tolerance import FACTOR, bounds, errors

__all__ = ["FACTOR", "assert_all_close_as_plain", "assert_close_as_plain", "errors"]


def assert_close_as_plain(
    name: str,
    got: torch.Tensor,
    truth: torch.Tensor,
    plain: torch.Tensor,
    factor: float = FACTOR,
    size: torch.Tensor | None = None,
) -> None:
    """The rule for one named tensor; NaN in `got` fails. size: see tolerance.bounds."""
    for metric, error, limit in bounds(got, truth, plain, size=size, factor=factor):
        assert error <= limit, (
            f"{name}: {metric} error {error:.3e} exceeds {limit:.3e} (factor {factor}, "
            f"plain PyTorch makes {errors(plain, truth)})"
        )


def assert_all_close_as_plain(
    got: dict[str, torch.Tensor],
    truth: dict[str, torch.Tensor],
    plain: dict[str, torch.Tensor],
    factor: float = FACTOR,
    sizes: dict[str, torch.Tensor] | None = None,
) -> None:
    """The rule for every named tensor; the three must name the same ones.

    sizes: by name, for sums whose terms have both signs.
    """
    assert got.keys() == truth.keys() == plain.keys(), (got.keys(), truth.keys(), plain.keys())
    for name in truth:
        size = (sizes or {}).get(name)
        assert_close_as_plain(name, got[name], truth[name], plain[name], factor, size)

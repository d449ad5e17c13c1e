"""The one rule of tolerance: `riskpo doctor` and every test of a kernel judge by it.

Truth is the reference in float64. `plain` is what honest plain PyTorch gives from the same inputs
in the same dtype (float32 logits, gradients rounded to the input dtype). A result passes when its
error is at most twice plain's, in the relative Frobenius norm and in the largest absolute error:

    err(got) <= FACTOR * err(plain) + floor * size

* size is the magnitude of the value or, for a sum whose terms have both signs, the sum of the
  terms' magnitudes: a sum that nearly cancels keeps the errors of its terms. A head's results sum
  products in its logits; riskpo/doctor/term_sizes.py has their sizes.
* For such a sum, plain's error is that of its terms (`summed`). In one number the terms' errors may
  cancel by luck, and an equally good result would then fail.
* floor is two units in the last place of float32, since plain PyTorch is sometimes exact by luck on
  small inputs. If all inputs are float64, plain is the truth and the floor is 1e-12.
* A tensor core reads the logits' gradient rounded to 16 bits, as in every fused loss; plain keeps
  it in float32. For 16-bit gradients from a GPU the floor is therefore one such rounding, half a
  unit in the last place: of the whole for the norm, of the largest value for the largest error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

FACTOR = 2.0
FLOOR = 2.0**-22
SIXTEEN = (torch.bfloat16, torch.float16)


class Bound(NamedTuple):
    """One metric of one tensor: its error and the limit."""

    metric: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.error <= self.limit  # False for NaN


class Sum(NamedTuple):
    """A sum's float64 value, plain's value if none of its terms' errors cancelled, and its size."""

    truth: torch.Tensor
    plain: torch.Tensor
    size: torch.Tensor


def tensor_core(x: torch.Tensor) -> bool:
    """Whether x was made where 16-bit products are (test_rounded_products.py pretends)."""
    return x.is_cuda


def errors(x: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """(relative Frobenius norm, largest absolute error) of x against truth, in float64.

    The norm is absolute where the truth is 0. Both are NaN where x is not finite; ValueError where
    the truth is not.
    """
    x, truth = _wide(x), _wide(truth)
    if not torch.isfinite(truth).all():
        raise ValueError("the float64 truth is not finite: choose other inputs")
    if x.numel() == 0:
        return 0.0, 0.0
    if not torch.isfinite(x).all():
        return float("nan"), float("nan")
    difference = (x - truth).abs()
    return float(difference.norm()) / _scale(truth), float(difference.max())


def summed(truth: torch.Tensor, plain: torch.Tensor) -> Sum:
    """What `bounds` needs for the sum of all elements of `truth`; plain holds the same terms."""
    truth, plain = _wide(truth), _wide(plain)
    total = truth.sum()
    return Sum(total, total + (plain - truth).abs().sum(), truth.abs().sum())


def bounds(
    got: torch.Tensor,
    truth: torch.Tensor,
    plain: torch.Tensor,
    *,
    size: torch.Tensor | None = None,
    factor: float = FACTOR,
) -> tuple[Bound, Bound]:
    """The rule for one tensor, in both metrics.

    size: magnitudes of the terms of every element, in truth's shape; the elements' own where None.
    ValueError where the shapes differ or the truth is not finite.
    """
    if not got.shape == truth.shape == plain.shape:
        raise ValueError(f"shapes differ: {got.shape}, truth {truth.shape}, plain {plain.shape}")
    if got.numel() == 0:
        return Bound("relative norm", 0.0, 0.0), Bound("largest absolute", 0.0, 0.0)
    size = _wide(truth if size is None else size).abs()
    floor = 1e-12 if got.dtype == plain.dtype == torch.float64 else FLOOR
    if got.dtype in SIXTEEN and tensor_core(got):
        floor = torch.finfo(got.dtype).eps / 2
    (norm, largest), (norm_plain, largest_plain) = errors(got, truth), errors(plain, truth)
    floor_norm = floor * float(size.norm()) / _scale(_wide(truth))
    return (
        Bound("relative norm", norm, factor * norm_plain + floor_norm),
        Bound("largest absolute", largest, factor * largest_plain + floor * float(size.max())),
    )


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.detach().double().cpu()


def _scale(truth: torch.Tensor) -> float:
    """Its norm, or 1 where it is 0."""
    return float(truth.norm()) or 1.0

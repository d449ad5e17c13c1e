"""The one rule of tolerance.

Truth is the reference in float64. `plain` is what honest plain PyTorch gives from the same inputs
in the same dtype (float32 logits, gradients rounded to the input dtype). A result passes when its
error is at most twice plain's, in the relative Frobenius norm and in the largest absolute error:

    err(got) <= FACTOR * err(plain) + floor

The floor is two units in the last place of float32: plain PyTorch is sometimes exact by luck on
small inputs, which must not fail an equally good result. Where everything is float64 plain is the
truth itself, and the floor is 1e-12.

A tensor core takes the gradient of the logits rounded to 16 bits, as in every fused loss; plain's
is float32. So for 16-bit gradients from a GPU the floor is one such rounding, half a unit in the
last place: of the whole for the norm, of the largest value for the largest error.
"""

from __future__ import annotations

import torch

FACTOR = 2.0
SIXTEEN = (torch.bfloat16, torch.float16)


def tensor_core(x: torch.Tensor) -> bool:
    """Whether x was made where 16-bit products are; tests/test_rounded_products.py pretends."""
    return x.is_cuda


def errors(x: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """(relative Frobenius norm, largest absolute error) of x against truth, in float64."""
    x, truth = x.detach().double(), truth.detach().double()
    if x.numel() == 0:
        return 0.0, 0.0
    assert torch.isfinite(truth).all(), "the float64 truth is not finite: choose other inputs"
    difference = (x - truth).abs()
    scale = truth.norm().item()
    return (difference.norm().item() / scale if scale else difference.norm().item()), (
        difference.max().item()
    )


def assert_close_as_plain(
    name: str, got: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor, factor: float = FACTOR
) -> None:
    """The rule above for one named tensor; NaN in `got` fails."""
    assert got.shape == truth.shape == plain.shape, (name, got.shape, truth.shape, plain.shape)
    if got.numel() == 0:
        return
    assert torch.isfinite(got).all(), f"{name}: not finite"
    floor = 1e-12 if got.dtype == plain.dtype == torch.float64 else 2.0**-22
    if got.dtype in SIXTEEN and tensor_core(got):
        floor = torch.finfo(got.dtype).eps / 2
    got_error, plain_error = errors(got, truth), errors(plain, truth)
    floors = (floor, floor * truth.abs().max().item())
    for metric, e_got, e_plain, floor in zip(
        ("relative norm", "largest absolute"), got_error, plain_error, floors, strict=True
    ):
        limit = factor * e_plain + floor
        assert e_got <= limit, (
            f"{name}: {metric} error {e_got:.3e} exceeds {limit:.3e} "
            f"(plain PyTorch makes {e_plain:.3e}, factor {factor}, floor {floor:.1e})"
        )


def assert_all_close_as_plain(
    got: dict[str, torch.Tensor],
    truth: dict[str, torch.Tensor],
    plain: dict[str, torch.Tensor],
    factor: float = FACTOR,
) -> None:
    """The rule for every named tensor; the three must name the same ones."""
    assert got.keys() == truth.keys() == plain.keys(), (got.keys(), truth.keys(), plain.keys())
    for name in truth:
        assert_close_as_plain(name, got[name], truth[name], plain[name], factor)

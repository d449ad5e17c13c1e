"""Errors at the door: every message says what came, what was expected and what to do."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def reject(op: str, came: str, expected: str, todo: str) -> NoReturn:
    """Raise the one kind of error a caller's mistake gets."""
    raise ValueError(f"{op}: got {came}; expected {expected}. {todo}")


def describe(x: object) -> str:
    """A tensor as `bfloat16[4, 7] on cuda:0`; anything else as `type value`."""
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def check_float(op: str, name: str, x: object) -> None:
    """`x` is a floating-point tensor."""
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        reject(op, f"{name} = {describe(x)}", "a floating-point tensor", f"Convert {name} first.")


def check_constant(op: str, **tensors: torch.Tensor | None) -> None:
    """None of the tensors that are given wants a gradient, for the op has none to give."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad:
            todo = f"Pass {name}.detach(): no gradient flows into it."
            reject(op, f"{name} that requires grad", "a constant", todo)


def check_device(op: str, **tensors: torch.Tensor | None) -> None:
    """All tensors that are given live on one device."""
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        came = ", ".join(f"{name} on {device}" for name, device in devices.items())
        reject(op, came, "every tensor on one device", "Move them with .to(device).")


def check_shape(op: str, name: str, x: torch.Tensor, shape: tuple[int, ...], why: str) -> None:
    """`x` has exactly `shape`; `why` names the tensor that fixes it."""
    if tuple(x.shape) != tuple(shape):
        reject(
            op,
            f"{name} of shape {list(x.shape)}",
            f"{list(shape)}, {why}",
            f"Reshape or slice {name} to match.",
        )


def check_choice(op: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """`value` is one of a few words."""
    if value not in choices:
        reject(op, f"{name}={value!r}", f"one of {list(choices)}", "Check the spelling.")


def check_positive(op: str, name: str, value: float, *, zero_ok: bool = False) -> None:
    """A host number that has to be finite and above zero (or not below it)."""
    bound = "at least 0" if zero_ok else "above 0"
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not (0 <= value if zero_ok else 0 < value) or value == float("inf"):
        reject(op, f"{name}={value!r}", f"a finite number {bound}", f"Set {name} accordingly.")


def constant(x: Any) -> Any:
    """An option's number as a constant of the graph that is being made; x itself outside of one.

    From its second value on torch.compile hands a Python float on as a symbol, and Inductor gives
    an operator's float argument the value of an earlier call. A constant is guarded instead:
    another value makes another graph.
    """
    if not torch.compiler.is_compiling() or not isinstance(x, (int, float)):
        return x
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # slow to import

    return guard_scalar(x)

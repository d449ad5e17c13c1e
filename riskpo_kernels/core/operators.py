"""How an op becomes an operator of PyTorch: torch.compile, export and autograd see one opaque node.

Eager calls go through the same operator, so there is one path to test. torch.library.Library, not
torch.library.custom_op: that one imports the whole compiler at the first eager call.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import GenericAlias
from typing import Any, NoReturn

import torch

NAMESPACE = "riskpo_kernels"
REFUSAL = (
    NAMESPACE + "::{}: got a backward through its gradient; expected at most one, for the op is "
    "differentiable once. Use backend='reference', which PyTorch differentiates again."
)
SOURCES = zlib.crc32(
    b"".join(file.read_bytes() for file in sorted(Path(__file__).parents[1].rglob("*.py")))
)
# a fragment: another copy of this package, as the Hub's kernels are loaded, adds its own names
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define `riskpo_kernels::name_HASH` and return the function that calls it.

    HASH is of the schema and of this package's sources. A graph that Inductor cached on disk calls
    its operators by name; after an upgrade it would call one of other arguments, or expect results
    of other shapes. Under a name of its own nothing of the old code is found.

    Args:
        schema: "(Tensor x, float s) -> Tensor" as PyTorch writes it, from schema_of; no argument is
            written to and no result shares memory with another tensor.
        kernel: what runs; its arguments are the schema's, all positional.
        fake: the same from shapes alone.
        setup_context, backward: as in torch.library.register_autograd, both or neither. A backward
            through the gradients that `backward` returns raises.
    """
    own = f"{name}_{zlib.crc32(schema.encode(), SOURCES):08x}"
    _library.define(own + schema)
    _library.impl(own, kernel, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{own}"
    torch.library.register_fake(qualified, fake, lib=_library)

    operator = getattr(getattr(torch.ops, NAMESPACE), own).default
    if backward is not None and setup_context is not None:
        differentiable = _differentiable(operator, setup_context, _once(name, backward))
        _library.impl(own, differentiable, "Autograd", with_keyset=True)
    return operator


def _differentiable(
    operator: Any, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """What torch.library.register_autograd makes of them, for a schema without defaults: those it
    would look for in every call took 0.12 of its 0.45 ms."""

    def below(*args: Any) -> Any:
        *own, keyset = args
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *own)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            results = below(*args)
            setup_context(ctx, args[:-1], results)
            return results

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            return *backward(ctx, *upstream), None  # the keyset's

    def call(keyset: Any, *args: Any) -> Any:
        asked = (isinstance(x, torch.Tensor) and x.requires_grad for x in args)
        return (Node.apply if torch.is_grad_enabled() and any(asked) else below)(*args, keyset)

    return call


def schema_of(kernel: Callable[..., Any], options: type, results: int) -> str:
    """The schema of kernel(*tensors, *numbers), which gives `results` tensors. Each argument is
    spelled once: tensors where the kernel names them, the others as fields of `options`."""
    named = list(inspect.signature(kernel).parameters.values())
    own = [p for p in named if p.kind is p.POSITIONAL_OR_KEYWORD]
    numbers = [
        inspect.Parameter(f.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=f.type)
        for f in fields(options)
    ]

    def prototype() -> None:
        """Stands for the kernel; its annotations are read where torch is imported: here."""

    prototype.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        own + numbers,
        return_annotation=GenericAlias(tuple, (torch.Tensor,) * results)
        if results > 1
        else torch.Tensor,
    )
    return torch.library.infer_schema(prototype, mutates_args=())


def gradients_through(
    operator: Callable[..., Any], sent: int, inputs: int = 3
) -> Callable[..., Any]:
    """The `backward` that calls operator(needs, *upstream, *saved, *options), of the first `sent`
    results' upstream gradients, for those of the first `inputs`; ctx is as `saving` of
    lm_head/operator.py left it."""

    def gradients(ctx: Any, *upstream: Any) -> tuple[torch.Tensor | None, ...]:
        needs, own = list(ctx.needs_input_grad[:inputs]), upstream[:sent]
        nothing = (None,) * len(ctx.needs_input_grad)
        if all(x is None for x in own) or not any(needs):
            return nothing
        found = operator(needs, *own, *ctx.saved_tensors, *ctx.options)
        return *(x if n else None for x, n in zip(found, needs, strict=True)), *nothing[inputs:]

    return gradients


def gradients_fake(needs: list[bool], *args: Any, sent: int = 3) -> tuple[torch.Tensor, ...]:
    """The shapes of such an operator's results, after `sent` upstream gradients."""
    hidden = args[sent]
    return tuple(
        hidden.new_empty(x.shape, dtype=x.dtype) if n and x is not None else hidden.new_empty(0)
        for x, n in zip(args[sent : sent + len(needs)], needs, strict=True)
    )


class _Refused(torch.autograd.Function):
    """x, which raises when a backward reaches it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> NoReturn:
        raise RuntimeError(REFUSAL.format(ctx.name))


def _once(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward`, whose gradients refuse a second derivative even where the upstream gradient is a
    constant (torch's own once_differentiable lets that one pass as if it were 0)."""

    def first(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():  # no create_graph: nobody can ask for a second one
            return found
        return tuple(
            x if x is None else _Refused.apply(x.detach().requires_grad_(), name) for x in found
        )

    return first

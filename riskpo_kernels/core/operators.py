"""How an op becomes an operator of PyTorch: torch.compile, export and autograd see one opaque node.

Eager calls go through the same operator, so there is one path to test. torch.library.Library, not
torch.library.custom_op: that one imports the whole compiler at the first eager call.
"""

from __future__ import annotations

import contextlib
import inspect
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
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


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, on a device that has it."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 nor sums in fp16 may touch the products inside: an op's precision
    is its own."""
    with no_autocast(device):
        if device.type != "cuda":
            yield
            return
        # not allow_tf32: reading that raises once anyone has used fp32_precision
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision, matmul.allow_fp16_accumulation
        matmul.fp32_precision, matmul.allow_fp16_accumulation = "ieee", False
        try:
            yield
        finally:
            matmul.fp32_precision, matmul.allow_fp16_accumulation = before


def register(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    under: Callable[[torch.device], AbstractContextManager[object]] = no_autocast,
) -> Callable[..., Any]:
    """Define `riskpo_kernels::name_HASH` and return the function that calls it.

    HASH is of the schema and of this package's sources. A graph that Inductor cached on disk calls
    its operators by name; after an upgrade it would call one of other arguments, or expect results
    of other shapes. Under a name of its own nothing of the old code is found.

    Args:
        schema: "(Tensor x, float s) -> Tensor" as PyTorch writes it, from schema_of; no argument is
            written to and no result shares memory with another tensor.
        kernel: what runs, in the context `under`; its arguments are the schema's, all positional.
        fake: the same from shapes alone.
        setup_context, backward: as in torch.library.register_autograd, both or neither. A backward
            through the gradients that `backward` returns raises.
    """
    own = f"{name}_{zlib.crc32(schema.encode(), SOURCES):08x}"

    def run(*args: Any) -> Any:
        with under(next(x.device for x in args if isinstance(x, torch.Tensor))):
            return kernel(*args)

    _library.define(own + schema)
    _library.impl(own, run, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{own}"
    torch.library.register_fake(qualified, fake, lib=_library)

    operator = getattr(getattr(torch.ops, NAMESPACE), own).default
    if backward is not None and setup_context is not None:
        autograd = _differentiable(operator, setup_context, _once(name, backward))
        _library.impl(own, autograd, "Autograd", with_keyset=True)
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
    return _schema(_positional(kernel), options, results)


def _schema(own: list[inspect.Parameter], options: type, results: int) -> str:
    words = [_argument(f.name, f.type) for f in fields(options)]
    several = GenericAlias(tuple, (torch.Tensor,) * results)

    def prototype() -> None:
        """Stands for the kernel; its annotations are read where torch is imported: here."""

    prototype.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*own, *words], return_annotation=several if results > 1 else torch.Tensor
    )
    return torch.library.infer_schema(prototype, mutates_args=())


def _positional(kernel: Callable[..., Any]) -> list[inspect.Parameter]:
    named = inspect.signature(kernel).parameters.values()
    return [p for p in named if p.kind is p.POSITIONAL_OR_KEYWORD]


def _argument(name: str, annotation: Any) -> inspect.Parameter:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, kind, annotation=annotation)


def saving(tensors: int, differentiable: int, skip: int | None = None) -> Callable[..., None]:
    """A `setup_context` that keeps the first `tensors` inputs and all outputs but the one at
    `skip`; the first `differentiable` outputs have gradients."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        kept = (x for i, x in enumerate(output) if i != skip)
        ctx.save_for_backward(*inputs[:tensors], *kept)
        ctx.options = inputs[tensors:]
        ctx.set_materialize_grads(False)  # a gradient nobody sent costs nothing
        ctx.mark_non_differentiable(*output[differentiable:])

    return setup_context


def differentiable(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    options: type,
    *,
    fake: Callable[..., Any],
    results: int,
    sent: int,
    unsaved: int | None = None,
    gradients: int = 3,
) -> Callable[..., Any]:
    """Register an operator and the one behind its backward, both of products; return what calls the
    first. `operator` and `backward` of that are PyTorch's own, which take the fields of `options`
    one by one.

    forward, fake    (*tensors, o) -> `results` tensors; the first `sent` of them are differentiable
    backward         (needs, upstream, tensors, found, o) -> gradients of the first `gradients`
                     tensors, None where `needs` says so; upstream: `sent` gradients or Nones;
                     found: the forward's results but the one at `unsaved`
    """
    own = _positional(forward)[:-1]
    n, kept = len(own), results - (unsaved is not None)
    below = _backward_operator(name, backward, own, kept, options, sent, gradients)

    def flat(kernel: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: kernel(*given[:n], options(*given[n:]))

    def through(ctx: Any, *upstream: Any) -> tuple[torch.Tensor | None, ...]:
        needs, nothing = list(ctx.needs_input_grad[:gradients]), (None,) * len(ctx.needs_input_grad)
        if all(x is None for x in upstream[:sent]) or not any(needs):
            return nothing
        made = below(needs, *upstream[:sent], *ctx.saved_tensors, *ctx.options)
        return *(x if y else None for x, y in zip(made, needs, strict=True)), *nothing[gradients:]

    operator = register(
        name,
        _schema(own, options, results),
        flat(forward),
        fake=flat(fake),
        setup_context=saving(n, sent, unsaved),
        backward=through,
        under=exact_products,
    )
    names = tuple(f.name for f in fields(options))  # torch 2.11's Dynamo traces no vars()

    def call(*given: Any) -> tuple[torch.Tensor, ...]:
        return operator(*given[:-1], *(getattr(given[-1], name) for name in names))

    call.operator, call.backward = operator, below  # type: ignore[attr-defined]
    return call


def _backward_operator(
    name: str,
    backward: Callable[..., Any],
    own: list[inspect.Parameter],
    kept: int,
    options: type,
    sent: int,
    gradients: int,
) -> Callable[..., Any]:
    """The operator behind the backward of `differentiable`: (needs, `sent` upstream gradients, the
    tensors `own`, `kept` results, words) -> `gradients` tensors, empty where none is needed."""
    n = len(own)

    def flat_backward(needs: list[bool], *given: Any) -> tuple[torch.Tensor, ...]:
        upstream, tensors = given[:sent], given[sent : sent + n]
        found, words = given[sent + n : sent + n + kept], given[sent + n + kept :]
        made = backward(needs, upstream, tensors, found, options(*words))
        return tuple(tensors[0].new_empty(0) if x is None else x for x in made)

    def flat_fake(needs: list[bool], *given: Any) -> tuple[torch.Tensor, ...]:
        tensors = given[sent : sent + gradients]
        none = tensors[0].new_empty(0)
        wanted = (none if x is None or not y else x for x, y in zip(tensors, needs, strict=True))
        return tuple(x.new_empty(x.shape) for x in wanted)

    upstream = [_argument(f"upstream_{i}", "torch.Tensor | None") for i in range(sent)]
    found = [_argument(f"found_{i}", "torch.Tensor") for i in range(kept)]
    given = [_argument("needs", "list[bool]"), *upstream, *own, *found]
    return register(
        f"{name}_backward",
        _schema(given, options, gradients),
        flat_backward,
        fake=flat_fake,
        under=exact_products,
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

"""How an op becomes an operator of PyTorch: torch.compile, export and autograd see one opaque node.

Eager calls go through the same operator, so there is one path to test. torch.library.Library, not
torch.library.custom_op: that one imports the whole compiler at the first eager call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

NAMESPACE = "riskpo_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")


def register(
    name: str,
    schema: str,
    kernel: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define `riskpo_kernels::name` and return the function that calls it.

    Args:
        schema: "(Tensor x, float s) -> Tensor" as PyTorch writes it; no argument is written to and
            no result shares memory with another tensor.
        kernel: what runs; its arguments are the schema's, all positional.
        fake: the same from shapes alone.
        setup_context, backward: as in torch.library.register_autograd; without them the results
            are not differentiable, and a backward through them raises.
    """
    _library.define(name + schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)

    def refuse(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError(f"{qualified} is not differentiable: its op is, once.")

    torch.library.register_autograd(
        qualified, backward or refuse, setup_context=setup_context, lib=_library
    )
    return getattr(getattr(torch.ops, NAMESPACE), name).default

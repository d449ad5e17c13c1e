"""A feed-forward layer over tiles of tokens: its intermediates exist for one tile at a time.

An MLP treats every token alone, so y[a:b] = mlp(x[a:b]) exactly. The forward keeps x; the backward
recomputes each tile, and adds up the weights' gradients in float32 (16-bit sums over many tiles
would lose what one product keeps).

T tokens, t of a tile, D hidden width. The technique is ALST's (arXiv 2506.13996, section 3.1.1).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from riskpo_kernels.causal_lm import decoder_of


class _Tiled(torch.autograd.Function):
    """mlp over tiles; its parameters are inputs, so that autograd owns their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        mlp: Callable[[torch.Tensor], torch.Tensor],
        rows: int,
        x: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.mlp, ctx.rows = mlp, rows
        ctx.save_for_backward(x, *parameters)
        flat = x.reshape(-1, x.shape[-1])
        y = torch.empty_like(flat)
        for start in range(0, len(flat), rows):
            y[start : start + rows] = mlp(flat[start : start + rows])
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        dy = upstream[0].reshape(-1, x.shape[-1])
        flat = x.detach().reshape(-1, x.shape[-1])
        dx = torch.empty_like(flat) if ctx.needs_input_grad[2] else None
        wide = [torch.promote_types(p.dtype, torch.float32) for p in parameters]
        sums = [torch.zeros_like(p, dtype=d) for p, d in zip(parameters, wide, strict=True)]
        for start in range(0, len(flat), ctx.rows):
            tile = flat[start : start + ctx.rows].requires_grad_(dx is not None)
            wanted = [tile] * (dx is not None) + parameters
            with torch.enable_grad():
                y = ctx.mlp(tile)
            found = list(torch.autograd.grad(y, wanted, dy[start : start + ctx.rows]))
            if dx is not None:
                dx[start : start + ctx.rows] = found.pop(0)
            for total, g in zip(sums, found, strict=True):
                total.add_(g)
        gradients = (g.to(p.dtype) for g, p in zip(sums, parameters, strict=True))
        return None, None, None if dx is None else dx.view(x.shape), *gradients


def tiled(
    mlp: torch.nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    rows: int,
    x: torch.Tensor,
) -> torch.Tensor:
    """forward(x) for x [..., D], at most `rows` tokens at a time; same value and gradients.

    forward is that of the module `mlp`, whose parameters get gradients.
    """
    if x.numel() <= rows * x.shape[-1]:
        return forward(x)
    learning = [p for p in mlp.parameters() if p.requires_grad]
    result: torch.Tensor = _Tiled.apply(forward, rows, x, *learning)
    return result


def tile_mlps(model: Any, rows: int) -> None:
    """Give every decoder layer's `mlp` the tiled forward; parameters and their names stay.

    ValueError for a model without one such module per layer, one that mixes tokens or returns
    more than its output (experts), or one that draws random numbers.
    """
    layers = getattr(decoder_of(model), "layers", None)
    mlps: list[Any] = [getattr(layer, "mlp", None) for layer in layers or ()]
    if not mlps or None in mlps:
        raise ValueError(
            f"memory.mlp_tile_tokens={rows}: got a {type(model).__name__} without `mlp` in each of "
            "its layers; expected one. Set it to 0."
        )
    for mlp in mlps:
        _check(mlp, rows)
        mlp.forward = partial(tiled, mlp, mlp.forward, rows)


def _check(mlp: torch.nn.Module, rows: int) -> None:
    for part in mlp.modules():
        kind = type(part).__name__
        if any(word in kind for word in ("Expert", "Moe", "Router")):
            raise ValueError(
                f"memory.mlp_tile_tokens={rows}: got a layer of experts ({kind}); expected a "
                "dense MLP. Set it to 0."
            )
        if isinstance(part, torch.nn.Dropout) and part.p > 0:
            raise ValueError(
                f"memory.mlp_tile_tokens={rows}: got dropout {part.p} inside the MLP, which a "
                "recomputed tile would draw anew; expected none. Set it to 0, or the dropout."
            )

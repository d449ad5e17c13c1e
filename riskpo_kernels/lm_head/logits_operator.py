"""The operators behind logits_logprob: forward and backward over rows [N], one opaque node each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from riskpo_kernels.core import softmax
from riskpo_kernels.core.checks import choose, live_rows
from riskpo_kernels.core.gradient import RowGradient, gradient
from riskpo_kernels.core.matmul import spans
from riskpo_kernels.core.operators import no_autocast, register, saving, schema_of
from riskpo_kernels.core.softmax import IGNORED, LogitMap, RowState, RowStats, finish

OP = "logits_logprob"
ROWS, COLS = 1024, 4096  # tile of the torch backend: 16 MiB of float32


@dataclass(frozen=True)
class Options:
    """Everything that is not a tensor."""

    softcap: float | None
    temperature: float
    return_entropy: bool
    inplace_backward: bool
    backend: str
    ignore_index: int | None

    def map(self, per_row: torch.Tensor | None, wide: torch.dtype) -> LogitMap:
        temperature = self.temperature if per_row is None else per_row.to(wide).contiguous()
        return LogitMap(1.0, self.softcap, temperature)


def _matrices(x: torch.Tensor, start: int = 0) -> Iterator[tuple[slice, torch.Tensor]]:
    """x [..., V] as (row range, [rows, V] view) without a copy, whatever the strides."""
    flat = x[None] if x.dim() == 1 else x
    if flat.dim() > 2:
        try:
            flat = flat.view(-1, x.shape[-1])
        except RuntimeError:  # a slice such as logits[:, :-1]: matrix by matrix
            for part in x:
                yield from _matrices(part, start)
                start += part.numel() // x.shape[-1]
            return
    yield slice(start, start + flat.shape[0]), flat


def _tile(z: torch.Tensor, rows: torch.Tensor | slice, v: slice, wide: torch.dtype) -> torch.Tensor:
    return z[rows, v].to(wide, copy=isinstance(rows, slice))  # the formulas work in place


def _torch_fold(
    z: torch.Tensor, target: torch.Tensor, state: RowState, map: LogitMap, all_live: bool
) -> None:
    for r in spans(z.shape[0], ROWS):
        live: torch.Tensor | slice = r
        if not all_live:
            live = (target[r] != IGNORED).nonzero()[:, 0] + r.start
        part = state.of(live)
        for v in spans(z.shape[1], COLS):
            tile = _tile(z, live, v, state.m.dtype)
            softmax.fold(tile, target[live] - v.start, None, part, map.of(live))
        state.put(live, part)


def _torch_gradient(
    z: torch.Tensor,
    target: torch.Tensor,
    up: RowGradient,
    map: LogitMap,
    out: torch.Tensor,
) -> None:
    active = up.live() & (target != IGNORED)
    for r in spans(z.shape[0], ROWS):
        rows = active[r].nonzero()[:, 0] + r.start
        at = up.of(rows)
        for v in spans(z.shape[1], COLS):
            tile = _tile(z, rows, v, up.peak.dtype)
            t = target[rows] - v.start
            gradient(tile, t, None, at, map.of(rows), tile)
            out[rows, v] = tile.to(out.dtype)
        out[r].masked_fill_(~active[r, None], 0)


def _gradient(z: torch.Tensor, *rest: Any, backend: str) -> None:
    if backend == "torch":
        return _torch_gradient(z, *rest)
    from riskpo_kernels.kernels import softmax_rows  # needs Triton: only on demand

    target, *others = rest
    softmax_rows.gradient(z, target, None, *others)
    return None


def _resolve(logits: torch.Tensor, numbers: tuple[Any, ...]) -> Options:
    o = Options(*numbers)
    return replace(o, backend=choose(OP, o.backend, logits.device, logits.dtype))


def _wide(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    row_temperature: torch.Tensor | None,
    *numbers: Any,
) -> tuple[torch.Tensor, ...]:
    """logits [..., V] and targets [N] -> logprob, entropy (or empty), lse | peak, log_sum; [N]"""
    o, wide = _resolve(logits, numbers), _wide(logits)
    checked = 1.0 if row_temperature is None else row_temperature
    live_rows(OP, target, logits.shape[-1], o.ignore_index, checked)
    ids, ignored = _marked(target, o)
    map, n = o.map(row_temperature, wide), target.numel()
    if o.backend == "triton":
        from riskpo_kernels.kernels.softmax_rows import row_statistics  # only on demand

        numbers_of = (1, o.return_entropy, 1, 1, 1)
        made = [torch.empty(n if x else 0, dtype=wide, device=logits.device) for x in numbers_of]
        for rows, z in _matrices(logits):
            into = [x[rows] if x.numel() else None for x in made]
            row_statistics(z, ids[rows], map.of(rows), into)
        return tuple(made)
    state = RowState.new(n, o.return_entropy, logits, wide)
    for rows, z in _matrices(logits):
        _torch_fold(z, ids[rows], state.of(rows), map.of(rows), o.ignore_index is None)
    logprob, entropy, peak, log_sum = finish(state)
    rows_of = (logprob, entropy, peak + log_sum, peak, log_sum)
    results = (logits.new_empty(0, dtype=wide) if x is None else x for x in rows_of)
    return tuple(
        x if ignored is None or not x.numel() else x.masked_fill(ignored, 0) for x in results
    )


def _marked(target: torch.Tensor, o: Options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Targets that say which rows are not to be read, and which those are (None: none)."""
    target = target.long()
    if o.ignore_index is None:
        return target.contiguous(), None
    ignored = target == o.ignore_index
    return target.masked_fill(ignored, IGNORED), ignored


def _forward_fake(
    logits: torch.Tensor, target: torch.Tensor, row_temperature: Any, *numbers: Any
) -> tuple[torch.Tensor, ...]:
    n, wide = target.shape[0], _wide(logits)
    sizes = (n, n if Options(*numbers).return_entropy else 0, n, n, n)
    return tuple(logits.new_empty(size, dtype=wide) for size in sizes)


def _backward(
    c: torch.Tensor | None,
    g: torch.Tensor | None,
    e: torch.Tensor | None,
    logits: torch.Tensor,
    target: torch.Tensor,
    row_temperature: torch.Tensor | None,
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    peak: torch.Tensor,
    log_sum: torch.Tensor,
    *numbers: Any,
    inplace: bool = False,
) -> torch.Tensor:
    """The gradient of logits: a contiguous tensor like them, or (inplace) themselves."""
    out = logits if inplace else _backward_fake(c, g, e, logits)
    o, wide = _resolve(logits, numbers), logprob.dtype
    ids, _ = _marked(target, o)
    stats = RowStats(logprob, entropy if o.return_entropy else None, peak, log_sum)
    map = o.map(row_temperature, wide)
    g = g if o.return_entropy else None  # a compiled graph sends zeros instead of nothing
    c, g, e = (None if x is None else x.to(wide) for x in (c, g, e))
    up = RowGradient.new(stats, c, g, e, map)
    for rows, z in _matrices(logits):
        dz = z if inplace else out.view(-1, out.shape[-1])[rows]
        _gradient(z, ids[rows], up.of(rows), map.of(rows), dz, backend=o.backend)
    return out


def _backward_fake(c: Any, g: Any, e: Any, logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


_backward_operator = register(
    "logits_logprob_backward",
    schema_of(_backward, Options, 1),
    _backward,
    fake=_backward_fake,
)


def _gradients(
    ctx: Any,
    c: torch.Tensor | None,
    g: torch.Tensor | None,
    e: torch.Tensor | None,
    *_: None,
) -> tuple[torch.Tensor | None, ...]:
    nothing = (None,) * len(ctx.needs_input_grad)
    if c is None and g is None and e is None:
        return nothing
    if getattr(ctx, "spent", False):
        raise RuntimeError(
            f"{OP}: the first backward overwrote the logits with their gradient; for a second "
            "backward call the op with inplace_backward=False."
        )
    if not Options(*ctx.options).inplace_backward:
        return _backward_operator(c, g, e, *ctx.saved_tensors, *ctx.options), *nothing[1:]
    ctx.spent = True
    logits, *rest = ctx.saved_tensors
    plain = logits.detach()
    with no_autocast(plain.device):
        out = _backward(c, g, e, plain, *rest, *ctx.options, inplace=True)
    torch.autograd.graph.increment_version(logits)  # whoever saved them must notice
    return out, *nothing[1:]


logits_operator = register(
    OP,
    schema_of(_forward, Options, 5),
    _forward,
    fake=_forward_fake,
    setup_context=saving(3, 3, skip=2),
    backward=_gradients,
)

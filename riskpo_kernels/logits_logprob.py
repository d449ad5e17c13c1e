"""The log-prob of the taken token and the entropy from logits that exist already.

    z = softcap(logits) / T       logprob = z_t - lse(z)       H = -sum p log p

    tensor            shape     dtype
    logits            [N, V]    bf16, fp16, fp32 (fp64 in torch and reference); any row stride
    logprob, entropy  [N]       fp32 (fp64)
    dlogits           [N, V]    dtype of logits, rounded once; may overwrite logits

Cost: the forward reads the logits once, the backward reads them once and writes the gradient once.
Everything between is float32 and one row of numbers long; ignored rows are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from riskpo_kernels import reference, softmax_rows
from riskpo_kernels.backends import choose
from riskpo_kernels.checks import check_device, check_float, check_shape, reject
from riskpo_kernels.chunks import spans
from riskpo_kernels.inputs import check_options, live_rows
from riskpo_kernels.reference import TokenLogProbs
from riskpo_kernels.softmax_rows import IGNORED, LogitMap, RowState, RowStats, finish

OP = "logits_logprob"
ROWS, COLS = 1024, 4096  # tile of the torch backend: 16 MiB of float32


@dataclass(frozen=True)
class Options:
    """Everything that is not a tensor."""

    softcap: float | None
    temperature: float
    entropy: bool
    inplace_backward: bool
    backend: str
    all_live: bool

    def map(self, per_row: torch.Tensor | None) -> LogitMap:
        return LogitMap(1.0, self.softcap, self.temperature if per_row is None else per_row)


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
            softmax_rows.fold(tile, target[live] - v.start, None, part, map.of(live))
        for whole, piece in zip(state, part, strict=True):
            if whole is not None and piece is not None:
                whole[live] = piece


def _torch_gradient(
    z: torch.Tensor,
    target: torch.Tensor,
    stats: RowStats,
    c: torch.Tensor | None,
    g: torch.Tensor | None,
    map: LogitMap,
    out: torch.Tensor,
) -> None:
    sent = sum((x != 0 for x in (c, g) if x is not None), start=torch.zeros_like(target) != 0)
    active = sent & (target != IGNORED)
    for r in spans(z.shape[0], ROWS):
        rows = active[r].nonzero()[:, 0] + r.start
        at = stats.of(rows)
        cr, gr = (None if x is None else x[rows] for x in (c, g))
        for v in spans(z.shape[1], COLS):
            tile = _tile(z, rows, v, stats.logprob.dtype)
            t = target[rows] - v.start
            out[rows, v] = softmax_rows.gradient(tile, t, None, at, cr, gr, map.of(rows), tile).to(
                out.dtype
            )
        out[r].masked_fill_(~active[r, None], 0)


def _fold(
    z: torch.Tensor, target: torch.Tensor, state: RowState, map: LogitMap, o: Options
) -> None:
    if o.backend == "torch":
        return _torch_fold(z, target, state, map, o.all_live)
    from riskpo_kernels.kernels.softmax_rows import fold  # needs Triton: only on demand

    return fold(z, target, None, state, map)


def _gradient(z: torch.Tensor, *rest: Any, backend: str) -> None:
    if backend == "torch":
        return _torch_gradient(z, *rest)
    from riskpo_kernels.kernels.softmax_rows import gradient  # needs Triton: only on demand

    target, *others = rest
    gradient(z, target, None, *others)
    return None


class _LogitsLogProb(torch.autograd.Function):
    """logits [..., V] and flat targets [N] -> logprob, entropy (or None), lse, each [N]."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        temperature: torch.Tensor | None,
        o: Options,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        map = o.map(temperature)
        wide = torch.promote_types(logits.dtype, torch.float32)
        state = RowState.new(target.numel(), o.entropy, logits, wide)
        for rows, z in _matrices(logits.detach()):
            _fold(z, target[rows], state.of(rows), map.of(rows), o)
        stats = finish(state)
        lse = stats.peak + stats.log_sum
        ctx.save_for_backward(logits, target, temperature, *stats)
        ctx.options = o
        ctx.spent = False
        ctx.set_materialize_grads(False)  # a gradient nobody sent costs nothing
        ctx.mark_non_differentiable(lse)
        return stats.logprob, stats.entropy, lse

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, c: torch.Tensor | None, g: torch.Tensor | None, _: None
    ) -> tuple[Any, ...]:
        if c is None and g is None:
            return None, None, None, None
        if ctx.spent:
            raise RuntimeError(
                f"{OP}: the first backward overwrote the logits with their gradient; for a second "
                "backward call the op with inplace_backward=False."
            )
        logits, target, temperature, *rest = ctx.saved_tensors
        o, stats = ctx.options, RowStats(*rest)
        map = o.map(temperature)
        c, g = (None if x is None else x.to(stats.logprob.dtype).contiguous() for x in (c, g))
        logits = logits.detach()
        ctx.spent = o.inplace_backward
        out = logits
        if not o.inplace_backward:
            out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for rows, z in _matrices(logits):
            cg = (None if x is None else x[rows] for x in (c, g))
            dz = z if o.inplace_backward else out.view(-1, out.shape[-1])[rows]
            _gradient(z, target[rows], stats.of(rows), *cg, map.of(rows), dz, backend=o.backend)
        if o.inplace_backward:
            torch.autograd.graph.increment_version(logits)  # whoever saved them must notice
        return out, None, None, None


def logits_logprob(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    ignore_index: int | None = -100,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> TokenLogProbs:
    """Log-prob of each target (and entropy) from logits, in float32 without a float32 copy.

    Args:
        logits: [..., V], bf16, fp16, fp32 (fp64 in torch and reference). Slices such as
            logits[:, :-1] are read where they are.
        target: [...] integer ids, already shifted; `ignore_index` rows give 0 for every result and
            zero gradient, and their logits are never read.
        ignore_index: None where no row is to be ignored: then the forward does not wait for the
            device and a CUDA graph can hold it. It does not look at the ids either: one outside
            the vocabulary gives log-prob -inf.
        temperature: above 0, a float or one per target; constant.
        softcap: logits become softcap * tanh(logits / softcap) before the temperature.
        return_entropy: also the entropy of that softmax.
        inplace_backward: the backward overwrites logits with their gradient, which saves the
            [..., V] buffer; a second backward then raises RuntimeError. Only for logits that
            nothing else needs.
        backend: "auto", "triton", "torch" or "reference"; see backend_report().

    Returns:
        TokenLogProbs(logprob, entropy, lse), each [...], in nats, float32 (float64 for float64
        logits); as linear_logprob.

    Raises:
        ValueError: wrong shapes, dtypes, devices or values, or a backend that cannot run here.
    """
    check_float(OP, "logits", logits)
    check_device(OP, logits=logits, target=target)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        reject(OP, f"logits {list(logits.shape)}", "[..., V] with V > 0", "Pass whole rows.")
    check_shape(OP, "target", target, tuple(logits.shape[:-1]), "logits without its last dimension")
    check_options(OP, tuple(target.shape), logits.device, temperature=temperature, softcap=softcap)
    if inplace_backward and logits.is_leaf and logits.requires_grad:
        reject(
            OP,
            "inplace_backward=True for leaf logits",
            "logits computed by the model",
            "A leaf keeps its value: leave inplace_backward off.",
        )
    shared = any(n > 1 and step == 0 for n, step in zip(logits.shape, logits.stride(), strict=True))
    if inplace_backward and shared:
        reject(
            OP,
            "inplace_backward=True for expanded logits, whose rows share memory",
            "logits with memory of their own",
            "Leave inplace_backward off, or clone the logits.",
        )
    chosen = choose(OP, backend, logits.device, logits.dtype)
    flat = target.reshape(-1)
    live_rows(OP, flat, logits.shape[-1], ignore_index, temperature)
    if chosen == "reference":
        return reference.logits_logprob(
            logits,
            target,
            temperature=temperature,
            softcap=softcap,
            return_entropy=return_entropy,
            ignore_index=ignore_index,
        )
    per_row = None
    if isinstance(temperature, torch.Tensor):
        wide = torch.promote_types(logits.dtype, torch.float32)
        per_row, temperature = temperature.reshape(-1).to(wide).contiguous(), 1.0
    everyone = ignore_index is None
    o = Options(softcap, float(temperature), return_entropy, inplace_backward, chosen, everyone)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    flat = flat.long()
    ignored = torch.zeros_like(flat, dtype=torch.bool) if everyone else flat == ignore_index
    results = _LogitsLogProb.apply(
        logits, flat.masked_fill(ignored, IGNORED).contiguous(), per_row, o
    )
    logprob, entropy, lse = (
        None if x is None else x.masked_fill(ignored, 0).view(target.shape) for x in results
    )
    return TokenLogProbs(logprob, entropy, lse)  # type: ignore[arg-type]

"""Hidden states to log-probs of the tokens taken and entropies; no [tokens, vocab] tensor.

    z = softcap(scale * (h W^T + b)) / T       logprob = z_t - lse(z)       H = -sum p log p

    tensor               shape            dtype
    hidden, weight       [N, D], [V, D]   bf16, fp16, fp32 (fp64 in torch and reference)
    logits tile          [rows, cols]     fp32 (fp64), never rounded to 16 bits
    logprob, entropy     [N]              fp32 (fp64)
    dH, dW, dbias        as their inputs  accumulated in fp32, rounded once

Cost in units of N D V (one product = 2): forward 2; backward 6 (recompute, dH, dW) times the share
of (row, vocabulary block) pairs that hold probability, of live rows only: an ignored row enters no
product, a row without upstream gradient none in the backward. The loops are in head_tiles.py and
sparse_blocks.py, the mathematics of a tile in softmax_rows.py, of dropping in block_selection.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from riskpo_kernels import reference
from riskpo_kernels.backends import choose
from riskpo_kernels.block_selection import DEFAULT_EPS, ActiveBlocks
from riskpo_kernels.chunks import exact_products
from riskpo_kernels.head_backward import backward_rows
from riskpo_kernels.head_tiles import Head, Options, Upstream, forward_rows
from riskpo_kernels.inputs import LiveRows, check_head, check_options, live_rows
from riskpo_kernels.reference import TokenLogProbs
from riskpo_kernels.softmax_rows import LogitMap, RowStats, finish

OP = "linear_logprob"


class _LinearLogProb(torch.autograd.Function):
    """hidden [N, D], head, live rows [n] -> logprob, entropy (or None), lse, each [n]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        temperature: torch.Tensor | None,
        rows: LiveRows,
        o: Options,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        map = LogitMap(o.scale, o.softcap, o.temperature if temperature is None else temperature)
        head = Head(hidden, weight, bias, rows.keep, rows.target, map)
        with exact_products(hidden.device):
            state, active = forward_rows(head, o)
            stats = finish(state)
        lse = stats.peak + stats.log_sum
        saved = (*stats, *(active or (None,) * 3))
        ctx.save_for_backward(hidden, weight, bias, temperature, rows.keep, rows.target, *saved)
        ctx.options = o
        ctx.set_materialize_grads(False)  # a gradient nobody sent costs nothing
        ctx.mark_non_differentiable(lse)
        return stats.logprob, stats.entropy, lse

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, c: torch.Tensor | None, g: torch.Tensor | None, _: None
    ) -> tuple[Any, ...]:
        hidden, weight, bias, temperature, index, target, *rest = ctx.saved_tensors
        o, needs = ctx.options, ctx.needs_input_grad[:3]
        if (c is None and g is None) or not any(needs):
            return (None,) * 6
        map = LogitMap(o.scale, o.softcap, o.temperature if temperature is None else temperature)
        head = Head(hidden, weight, bias, index, target, map)
        c, g = (None if x is None else x.to(rest[0].dtype).contiguous() for x in (c, g))
        up = Upstream(RowStats(*rest[:4]), c, g)
        active = None if rest[4] is None else ActiveBlocks(*rest[4:])
        # Rows without a coefficient enter no product. One host synchronisation: the number of
        # the others is the shape of the products.
        sent = sum((x != 0 for x in (c, g) if x is not None), start=torch.zeros_like(target) != 0)
        keep = sent.nonzero()[:, 0]
        if keep.numel() < target.numel():
            head, up = head.of(keep), up.of(keep)
            active = None if active is None else active.of(keep)
        with exact_products(hidden.device):
            return *backward_rows(head, up, active, needs, o), None, None, None


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    ignore_index: int | None = -100,
    tail_eps: float | None = None,
    vocab_group: Any = None,
    memory_mib: float = 300,
    deterministic: bool = False,
    backend: str = "auto",
) -> TokenLogProbs:
    """Log-prob of each target (and entropy) from hidden states; the logits are never stored.

    Args:
        hidden: [..., D], any strides. Width first: `hidden @ weight.T` are the logits.
        weight: [V, D] head, of hidden's dtype; 16-bit hidden with a float32 weight computes in
            float32. A frozen weight costs no dW work.
        target: [...] integer ids, already shifted; `ignore_index` rows give 0 for every result and
            zero gradient, and their hidden states are never read.
        ignore_index: None where no row is to be ignored: then the forward does not wait for the
            device and a CUDA graph can hold it. It does not look at the ids either: one outside
            the vocabulary gives log-prob -inf.
        bias: [V], weight's dtype or float32.
        temperature: above 0, a float or one per target; constant.
        scale, softcap: logits are softcap(scale * (h W^T + bias)) / temperature.
        return_entropy: also the entropy of that softmax.
        tail_eps: a block of 128 vocabulary columns with less softmax mass than this (less still
            for a near-certain row) gets no gradient from the row; what a row loses is at most
            32 tail_eps |upstream| in the 1-norm of its logits' gradient (block_selection.py). Rows
            of the head below the threshold for every token get a zero gradient. 0 is exact.
            Default: 2^-14 for bf16, 2^-18 for fp16, 0 for fp32 and fp64.
        vocab_group: not available yet: ValueError.
        memory_mib: workspace in MiB beside results, gradients and, for 16-bit inputs, one float32
            accumulator: of the smaller of [N, D] and [V, D], or of [V, D] where rows of both ways,
            dense and sparse, meet.
        deterministic: choose between the dense and the sparse backward row by row, so that no
            row's treatment depends on its company; results repeat bitwise run to run.
        backend: "auto", "triton", "torch" or "reference"; see backend_report().

    Returns:
        TokenLogProbs(logprob, entropy, lse), each [...], in nats, float32 (float64 for float64
        inputs). logprob and entropy are differentiable once, for any upstream gradients; entropy
        is None unless asked for; lse is not differentiable. logprob <= 0 and entropy >= 0 hold
        exactly.

    Raises:
        ValueError: wrong shapes, dtypes, devices or values, an empty or sharded weight, a backend
            that cannot run here, or a memory_mib below one small tile.
    """
    if vocab_group is not None:
        raise ValueError(
            f"{OP}: got vocab_group={vocab_group!r}; expected None: the vocabulary-parallel head "
            "is not available in this version. Gather the weight and pass it whole."
        )
    check_head(OP, hidden, weight, target, bias, sharded_ok=False)
    check_options(
        OP,
        tuple(target.shape),
        hidden.device,
        temperature=temperature,
        scale=scale,
        softcap=softcap,
        memory_mib=memory_mib,
        tail_eps=tail_eps,
    )
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    chosen = choose(OP, backend, hidden.device, dtype)
    rows = live_rows(OP, target.reshape(-1), weight.shape[0], ignore_index, temperature)
    if chosen == "reference":
        return reference.linear_logprob(
            hidden,
            weight,
            target,
            bias=bias,
            temperature=temperature,
            scale=scale,
            softcap=softcap,
            return_entropy=return_entropy,
            ignore_index=ignore_index,
        )
    per_row = None
    if isinstance(temperature, torch.Tensor):
        wide = torch.promote_types(dtype, torch.float32)
        per_row = temperature.reshape(-1).to(wide).contiguous()
        per_row = per_row if rows.keep is None else per_row[rows.keep]
        temperature = 1.0
    eps = DEFAULT_EPS.get(dtype, 0.0) if tail_eps is None else float(tail_eps)
    options = Options(
        scale=float(scale),
        softcap=softcap,
        temperature=float(temperature),
        entropy=return_entropy,
        backend=chosen,
        memory_mib=memory_mib,
        tail_eps=eps / (1 if softcap is None else 4),
        deterministic=deterministic,
    )
    flat = hidden.reshape(-1, hidden.shape[-1])
    bias = None if bias is None else bias.contiguous()
    results = _LinearLogProb.apply(flat, weight, bias, per_row, rows, options)
    return TokenLogProbs(*(_spread(x, rows.keep, target) for x in results))  # type: ignore[arg-type]


def _spread(
    x: torch.Tensor | None, index: torch.Tensor | None, target: torch.Tensor
) -> torch.Tensor | None:
    """Results of the live rows [n] back in the caller's shape, zero where ignored."""
    if x is None:
        return None
    if index is not None:
        x = x.new_zeros(target.numel()).index_copy(0, index, x)
    return x.reshape(target.shape)

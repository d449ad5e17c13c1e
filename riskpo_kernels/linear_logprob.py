"""Hidden states to log-probs of the tokens taken and entropies; no [tokens, vocab] tensor.

    z = softcap(scale * (h W^T + b)) / T       logprob = z_t - lse(z)       H = -sum p log p

    tensor                 shape            dtype
    hidden, weight         [N, D], [V, D]   bf16, fp16, fp32 (fp64 in torch and reference)
    logits tile            [rows, cols]     fp32 (fp64), never rounded to 16 bits
    logprob, entropy, lse  [N]              fp32 (fp64)
    dH, dW, dbias          as their inputs  accumulated in fp32, rounded once

Cost in units of N D V (one product = 2): forward 2; backward 6 (recompute, dH, dW) times the share
of (row, vocabulary block) pairs that hold probability. An ignored row enters no product, a row
without upstream gradient none in the backward. On a CPU the forward keeps some logits, all of a
small head's, which saves their recompute.

To read on: the forward is lm_head/operator.py; a tile's product is core/matmul.py, what is made of
it core/softmax.py. Of the backward lm_head/backward_operator.py is the first page. Shards of a
vocabulary are lm_head/vocab_parallel.py.
"""

from __future__ import annotations

from typing import Any

import torch

from riskpo_kernels import reference
from riskpo_kernels.core.checks import (
    BACKENDS,
    check_choice,
    check_flags,
    check_head,
    check_ignore_index,
    check_options,
    constant,
    live_rows,
)
from riskpo_kernels.core.matmul import Options
from riskpo_kernels.core.operators import no_autocast
from riskpo_kernels.core.process_groups import NO_GROUP, name_of
from riskpo_kernels.core.softmax import DEFAULT_EPS
from riskpo_kernels.lm_head.lora import Lora, check_lora, lora_operator
from riskpo_kernels.lm_head.operator import head_operator
from riskpo_kernels.lm_head.support import (
    OUTSIDE,
    Support,
    check_inside,
    check_lists,
    check_support,
    support_operator,
)
from riskpo_kernels.lm_head.targets import targets_operator
from riskpo_kernels.reference import TokenLogProbs

OP = "linear_logprob"


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
    support: Support | None = None,
    outside_support: str = "raise",
    lora: Lora | None = None,
    tail_eps: float | None = None,
    vocab_group: Any = None,
    memory_mib: float = 300,
    deterministic: bool = False,
    backend: str = "auto",
) -> TokenLogProbs:
    """Log-prob of each target (and entropy) from hidden states, within memory_mib of workspace.

    Args:
        hidden: [..., D], any strides; hidden @ weight.T are the logits.
        weight: [V, D] head, of hidden's dtype; 16-bit hidden with a float32 weight computes in
            float32. A frozen weight costs no dW work.
        target: [...] integer ids, already shifted. [..., K] asks for the log-probs of K ids a row
            from the same pass.
        ignore_index: the id of rows that do not count. They give 0 for every result and zero
            gradient, and their hidden states are never read; of K ids, an ignored one gives 0.
            None: all rows count, the forward does not wait for the device (a CUDA graph can hold
            it), and ids are not checked: one outside the vocabulary gives log-prob -inf.
        bias: [V], weight's dtype or float32.
        temperature: above 0, a float or one per row [...]; constant.
        scale, softcap: logits are softcap(scale * (h W^T + bias)) / temperature.
        return_entropy: also the entropy of that softmax.
        support: the ids that a sampler's top-k, top-p or min-p kept of each row. Softmax, entropy
            and lse are over these alone, and only their rows of the head are read. Either
            (token_ids [P], offsets [N + 1]) as in vLLM's SamplingMask, rows of target in order, or
            ids [..., K] padded with -1; in any order, no id twice in a row. Exact whatever tail_eps
            is. The host waits for the device. Backend triton takes about 50 bytes an id beside
            memory_mib, and always gives the bits that deterministic=True promises. Those of torch
            then repeat run to run, but depend on the rows beside.
        outside_support: "raise" for a target that its row does not keep, or "-inf": its log-prob,
            a constant. Count them with logprob.isneginf().sum().
        lora: (A [r, D], B [V, r], factor), an adapter on the head as peft's LoRA has it (factor =
            lora_alpha / r): the logits are those of weight + factor B A, which is never made.
            Gradients go to A, B and hidden; weight must be frozen. A and B have hidden's dtype, or
            float32 beside 16 bits. A float32 [N, D + 3r] buffer (3r rounded up to a multiple of 16)
            holds dH until it is rounded.
        tail_eps: a block of 128 vocabulary columns whose softmax mass in a row is below this (below
            less for a near-certain row, or near a softcap) gets no gradient from that row. A row
            loses at most 32 tail_eps |upstream| in the 1-norm of its logits' gradient
            (core/softmax.py). 0 is exact. Default: 2^-14 for bf16, 2^-18 for fp16, 0 for
            fp32 and fp64. A row of the head that is below the threshold for every token gets a zero
            gradient, so under Adam rows that are never a target move less (half as far in a short
            run).
        vocab_group: a process group whose ranks hold the columns of the head in rank order. weight
            and bias are this rank's, perhaps empty. target holds ids of the whole vocabulary;
            hidden, target and every option are the same on all ranks. Every rank must compute the
            same loss from the results. dH is summed over the group; dW and dbias cover only this
            rank's shard (lm_head/vocab_parallel.py).
        memory_mib: workspace in MiB beside results, gradients and, for 16-bit inputs, one float32
            accumulator (of the smaller of [N, D] and [V, D], or of [V, D] where a batch has dense
            and sparse rows). On a CPU every call holds up to a twentieth of it for logits until its
            backward: lower it where many calls wait for one backward.
        deterministic: results repeat bitwise run to run, and a row's results and dH have the same
            bits whatever rows are beside it (not for float16 on CUDA, whose gradients are scaled by
            the largest upstream one, nor on a CPU where D is no multiple of 4). Slower: products of
            128 rows, some of them padding.
        backend: "auto", "triton", "torch" or "reference"; see backend_report().

    Returns:
        TokenLogProbs(logprob, entropy, lse), in nats, float32 (float64 for float64 inputs); each
        [...], logprob in target's shape; entropy is None unless asked for. All three are
        differentiable once, for any upstream gradients. lse serves a z-loss, or as hidden @
        weight[k] - lse another token's log-prob. logprob <= 0 and entropy >= 0 hold exactly.

    Raises:
        ValueError: wrong shapes, dtypes, devices or values, an empty or sharded weight, a backend
            that cannot run here, a memory_mib below one small tile, or (on every rank) ranks of
            vocab_group that were given different rows or options.
    """
    temperature, scale, softcap, ignore_index, tail_eps, memory_mib = map(
        constant, (temperature, scale, softcap, ignore_index, tail_eps, memory_mib)
    )
    check_head(OP, hidden, weight, target, bias, sharded_ok=vocab_group is not None)
    rows, several = tuple(hidden.shape[:-1]), target.dim() == hidden.dim()
    logits: dict[str, Any] = {"temperature": temperature, "scale": scale, "softcap": softcap}
    check_options(OP, rows, hidden.device, **logits, memory_mib=memory_mib, tail_eps=tail_eps)
    check_choice(OP, "backend", backend, BACKENDS)
    check_choice(OP, "outside_support", outside_support, OUTSIDE)
    check_flags(OP, return_entropy=return_entropy, deterministic=deterministic)
    check_ignore_index(OP, ignore_index)
    group = NO_GROUP if vocab_group is None else name_of(OP, "vocab_group", vocab_group)
    if lora is not None:
        check_lora(lora, hidden, weight, several or support is not None)
    kept = None if support is None else check_support(support, rows, target)
    if backend == "reference":
        if vocab_group is None:
            _check_ids(target, several, weight.shape[0], ignore_index, temperature, kept)
        with no_autocast(hidden.device):
            out = reference.linear_logprob(
                hidden,
                weight,
                target,
                bias=bias,
                **logits,
                return_entropy=return_entropy,
                ignore_index=ignore_index,
                support=support,
                lora=lora,
                vocab_group=vocab_group,
            )
        if kept is not None and outside_support == "raise":
            check_inside(out.logprob)
        return out
    if tail_eps is None:
        tail_eps = DEFAULT_EPS.get(torch.promote_types(hidden.dtype, weight.dtype), 0.0)
    leaves = (hidden, weight, bias, *(lora or ())[:2])
    per_row = isinstance(temperature, torch.Tensor)
    o = Options(
        scale=scale,
        softcap=softcap,
        temperature=1.0 if isinstance(temperature, torch.Tensor) else temperature,
        return_entropy=return_entropy,
        backend=backend,
        memory_mib=memory_mib,
        tail_eps=tail_eps,
        deterministic=deterministic,
        keep=torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves),
        ignore_index=ignore_index,
        group=group,
        factor=1.0 if lora is None else float(lora[2]),
        raises=outside_support == "raise",
    )
    found = _operated(hidden, weight, bias, target, temperature if per_row else None, kept, lora, o)
    logprob, lse = _shaped(found[0], target.shape), _shaped(found[2], rows)
    return TokenLogProbs(logprob, _shaped(found[1], rows) if return_entropy else None, lse)


def _operated(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_temperature: Any,
    kept: tuple[torch.Tensor, torch.Tensor | None] | None,
    lora: Lora | None,
    o: Options,
) -> tuple[torch.Tensor, ...]:
    """What the operator for such arguments gives over flat rows."""
    several = target.dim() == hidden.dim()
    h, ids = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    rest = (ids, None if row_temperature is None else row_temperature.reshape(-1))
    if kept is not None:
        return support_operator(h, weight, bias, *rest, *kept, o)
    if lora is not None:
        return lora_operator(h, *lora[:2], bias, weight, *rest, o)
    if several:
        return targets_operator(h, weight, bias, target.flatten(0, -2), rest[1], o)
    return head_operator(h, weight, bias, *rest, o)


def _shaped(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return x if x.shape == shape else x.view(shape)  # a view is a node of the graph: 10 us


def _check_ids(
    target: torch.Tensor,
    several: bool,
    vocab: int,
    ignore_index: int | None,
    temperature: float | torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor | None] | None,
) -> None:
    """What the operators check of the values, for the reference."""
    if several and isinstance(temperature, torch.Tensor):
        temperature = temperature[..., None].expand_as(target)
    live_rows(OP, target.reshape(-1), vocab, ignore_index, temperature)
    if kept is not None:
        check_lists(*kept, vocab, target, ignore_index)

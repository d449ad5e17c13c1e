"""How far a student's next-token distributions are from a teacher's; no [tokens, vocab] tensor.

    forward_kl   KL(q || p)      p = softmax(student's logits / T), q = softmax(teacher's / T)
    reverse_kl   KL(p || q)
    jsd          beta KL(q || m) + (1 - beta) KL(p || m),   m = beta q + (1 - beta) p

    tensor                          shape            dtype
    hidden, weight                  [N, D], [V, D]   bf16, fp16, fp32, fp64
    teacher_hidden, teacher_weight  [N, E], [V, E]   any of them, of its own
    divergence                      [N]              fp32 (fp64)
    dH, dW, dbias                   as their inputs  accumulated in fp32, rounded once

Both heads go through the same tiles: lm_head/divergence.py has the mathematics, the cost and the
bound of what tail_eps drops. Products are torch's (cuBLAS on CUDA); what is made of their results
is one Triton kernel a pass (kernels/divergence_tiles.py) or PyTorch.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from riskpo_kernels import reference
from riskpo_kernels.core.checks import (
    BACKENDS,
    check_choice,
    check_constant,
    check_device,
    check_head,
    check_options,
    check_positive,
    check_shape,
    constant,
    reject,
)
from riskpo_kernels.core.operators import no_autocast
from riskpo_kernels.core.process_groups import name_of
from riskpo_kernels.core.softmax import DEFAULT_EPS
from riskpo_kernels.linear_logprob import linear_logprob
from riskpo_kernels.lm_head.divergence import KINDS, OP, Words, divergence_operator
from riskpo_kernels.lm_head.divergence_stats import LOWEST

IGNORE = -(2**40)  # no id of any vocabulary
LEAST_TAIL = 2.0**-24  # probability of the bucket: float32's rounding of a sum to 1


def linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    teacher_bias: torch.Tensor | None = None,
    teacher_scale: float = 1.0,
    teacher_softcap: float | None = None,
    tail_eps: float | None = None,
    vocab_group: Any = None,
    memory_mib: float = 300,
    backend: str = "auto",
) -> torch.Tensor:
    """Divergence [...] of each token in nats, exact over the whole vocabulary, never below 0.

    Args:
        hidden, weight, bias: the student's, as in linear_logprob; these get gradients. A bias of
            -inf rules a word out: inf where the other side weighs it, else as if it were not there.
        teacher_hidden: [..., E], teacher_weight: [V, E], teacher_bias: [V], constants. Width and
            dtype may differ from the student's; for the student's own head pass weight.detach().
            Row v is the same word on both sides: of padded vocabularies pass the rows both have.
        kind: "forward_kl" = KL(teacher || student), "reverse_kl" = KL(student || teacher), "jsd".
        beta: of jsd, the teacher's share of the mixture, between 0 and 1 without them (GKD).
        temperature: of both sides, above 0, a float or one per row; the result is not multiplied
            by its square.
        mask: [...] bool; False gives 0 and no gradient, and the row is never read.
        scale, softcap, teacher_scale, teacher_softcap: what shapes the logits of either side.
        tail_eps: blocks of 128 columns that matter little to a row get no gradient from it. A row
            loses at most 32 tail_eps |upstream| in the 1-norm of its logits' gradient
            (lm_head/divergence.py). 0 is exact. Default: 2^-14 for bf16, 2^-18 for fp16, else 0.
        vocab_group: as in linear_logprob; both heads are this rank's same columns.
        memory_mib: workspace in MiB beside results, gradients and one float32 [N, D].
        backend: "auto", "triton", "torch" or "reference"; see backend_report().

    Raises:
        ValueError: wrong shapes, dtypes, devices, kinds or numbers; a teacher that requires grad.

    Sources: arXiv 1503.02531 (forward), 2306.08543 (reverse), 2306.13649 (jsd).
    """
    temperature, beta, scale, softcap, teacher_scale, teacher_softcap, tail_eps, memory_mib = map(
        constant,
        (temperature, beta, scale, softcap, teacher_scale, teacher_softcap, tail_eps, memory_mib),
    )
    rows = tuple(hidden.shape[:-1])
    names = ", ".join(f"teacher_{x}" for x in ("hidden", "weight", "bias", "scale", "softcap"))
    student = (OP, hidden, weight, bias, scale, softcap)
    teacher = (teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    numbers: dict[str, Any] = {"temperature": temperature, "memory_mib": memory_mib}
    for op, h, w, b, factor, cap in (student, (f"{OP}, one of {names}", *teacher)):
        target = torch.zeros(rows, dtype=torch.int64, device=h.device)
        check_head(op, h, w, target, b, sharded_ok=vocab_group is not None)
        check_options(op, rows, h.device, scale=factor, softcap=cap, tail_eps=tail_eps, **numbers)
    sizes = weight.shape[0], teacher_weight.shape[0]
    if sizes[0] != sizes[1]:
        todo = "Cut both heads to the words they share, in one order."
        reject(OP, f"heads of {sizes[0]} and {sizes[1]} words", "one vocabulary", todo)
    check_device(OP, hidden=hidden, teacher_hidden=teacher_hidden)
    check_constant(
        OP,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
    )
    _check_kind(OP, kind, beta)
    check_choice(OP, "backend", backend, BACKENDS)
    _check_mask(OP, mask, rows, hidden)
    group = name_of(OP, "vocab_group", vocab_group)
    words: dict[str, Any] = {"kind": kind, "beta": beta, "scale": scale, "softcap": softcap}
    words |= {"teacher_scale": teacher_scale, "teacher_softcap": teacher_softcap}
    if backend == "reference":
        heads = (hidden, weight, teacher_hidden, teacher_weight)
        words |= {"bias": bias, "teacher_bias": teacher_bias, "vocab_group": vocab_group}
        with no_autocast(hidden.device):
            return reference.linear_divergence(*heads, temperature=temperature, mask=mask, **words)
    if tail_eps is None:
        tail_eps = DEFAULT_EPS.get(torch.promote_types(hidden.dtype, weight.dtype), 0.0)
    found = divergence_operator(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        teacher_hidden.reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight,
        teacher_bias,
        None if mask is None else mask.reshape(-1).bool(),
        temperature.reshape(-1) if isinstance(temperature, torch.Tensor) else None,
        Words(
            temperature=1.0 if isinstance(temperature, torch.Tensor) else temperature,
            tail_eps=tail_eps,
            group=group,
            memory_mib=memory_mib,
            backend=backend,
            **words,
        ),
    )
    return found[0].view(rows)


def topk_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    teacher_logprob: torch.Tensor,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    tail_eps: float | None = None,
    vocab_group: Any = None,
    memory_mib: float = 300,
    deterministic: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Divergence [...] over a teacher's K tokens and one bucket that holds all others.

    For a teacher that can only send K log-probs, such as a server. With the bucket both sides stay
    distributions, so the result is a divergence: never below 0, and at most the one over the whole
    vocabulary. The bucket's probability is 1 minus the others', at least 2^-24.

    Args:
        token_ids, teacher_logprob: [..., K], K different ids a row and the teacher's log-probs of
            them at this temperature, over the whole vocabulary; constants.
        kind, beta, temperature, mask: as in linear_divergence.
        the others: as in linear_logprob, which computes the student's log-probs in one pass.

    Raises ValueError as linear_logprob; for log-probs that are no part of a distribution; for an id
    twice in a row.
    """
    op = "topk_divergence"
    rows = tuple(hidden.shape[:-1])
    _check_kind(op, kind, beta)
    _check_mask(op, mask, rows, hidden)
    check_device(op, hidden=hidden, token_ids=token_ids, teacher_logprob=teacher_logprob)
    check_constant(op, teacher_logprob=teacher_logprob)
    if token_ids.dim() != hidden.dim() or tuple(token_ids.shape[:-1]) != rows:
        came = f"token_ids {list(token_ids.shape)} for hidden {list(hidden.shape)}"
        reject(op, came, f"{[*rows, 'K']}", "Give each row its K ids.")
    check_shape(op, "teacher_logprob", teacher_logprob, tuple(token_ids.shape), "one per id")
    live = torch.ones(rows, dtype=torch.bool, device=hidden.device) if mask is None else mask.bool()
    _check_teacher(op, token_ids, teacher_logprob, live)
    logits: dict[str, Any] = {"bias": bias, "temperature": temperature, "scale": scale}
    logits |= {"softcap": softcap, "vocab_group": vocab_group}
    if backend == "reference":
        given = (hidden, weight, token_ids, teacher_logprob)
        with no_autocast(hidden.device):
            return reference.topk_divergence(*given, kind=kind, beta=beta, mask=mask, **logits)
    log_p = linear_logprob(
        hidden,
        weight,
        token_ids.masked_fill(~live[..., None], IGNORE),
        ignore_index=IGNORE,
        tail_eps=tail_eps,
        memory_mib=memory_mib,
        deterministic=deterministic,
        backend=backend,
        **logits,
    ).logprob
    best = log_p.argmax(-1, keepdim=True)
    # 1 - p of the likeliest is exact: only what the others take of it is subtracted
    left = -torch.expm1(log_p.gather(-1, best)) - log_p.exp().scatter(-1, best, 0.0).sum(-1, True)
    mine = torch.cat([log_p, left.clamp(min=LEAST_TAIL).log()], -1)
    log_q = teacher_logprob.masked_fill(~live[..., None], -1e3).to(log_p)
    rest = (1 - log_q.exp().sum(-1, keepdim=True)).clamp(min=LEAST_TAIL).log()
    return _divergence(mine, torch.cat([log_q, rest], -1), kind, beta).clamp(min=0.0) * live


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor, kind: str, beta: float) -> torch.Tensor:
    """Of distributions given whole, over the last dimension."""
    if kind == "forward_kl":
        return _kl(log_q, log_p)
    if kind == "reverse_kl":
        return _kl(log_p, log_q)
    # -inf on both sides would have no gradient
    log_p, log_q = log_p.clamp(min=LOWEST), log_q.clamp(min=LOWEST)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """KL(a || b). A word without probability in a weighs nothing, whatever b has."""
    gap = (log_a - log_b).masked_fill(log_a.isneginf(), 0.0)
    return (log_a.exp() * gap).sum(-1)


def _check_kind(op: str, kind: str, beta: float) -> None:
    check_choice(op, "kind", kind, KINDS)
    check_positive(op, "beta", beta, zero_ok=True)
    if kind == "jsd" and not 0 < beta < 1:
        todo = "At 0 it is forward_kl, at 1 reverse_kl (up to their factor): ask for these."
        reject(op, f"beta={beta!r}", "a number between 0 and 1", todo)


def _check_mask(
    op: str, mask: torch.Tensor | None, rows: tuple[int, ...], hidden: torch.Tensor
) -> None:
    if mask is not None:
        check_shape(op, "mask", mask, rows, "hidden without its width")
        check_device(op, hidden=hidden, mask=mask)


def _check_teacher(op: str, ids: torch.Tensor, logprob: torch.Tensor, live: torch.Tensor) -> None:
    """One host synchronisation."""
    twice = (ids.sort(-1).values.diff(dim=-1) == 0).any(-1) & live
    mass = logprob.double().exp().sum(-1)
    wrong = ((logprob > 0).any(-1) | ~(mass <= 1 + 1e-3)) & live
    n_twice, n_wrong = torch.stack([twice.sum(), wrong.sum()]).tolist()
    if n_twice:
        reject(op, f"{n_twice} rows with an id twice", "K different ids", "Drop the copies.")
    if n_wrong:
        came = f"{n_wrong} rows of teacher_logprob that are above 0, NaN, or sum to more than 1"
        reject(op, came, "log-probs over the whole vocabulary", "Pass them in nats, normalised.")

"""The log-prob of the taken token and the entropy from logits that exist already.

    z = softcap(logits) / T       logprob = z_t - lse(z)       H = -sum p log p

    tensor                 shape     dtype
    logits                 [N, V]    bf16, fp16, fp32 (fp64 in torch and reference); any row stride
    logprob, entropy, lse  [N]       fp32 (fp64)
    dlogits                [N, V]    dtype of logits, rounded once; may overwrite logits

Cost: the forward reads the logits once, the backward reads them once and writes the gradient once.
Everything between is float32 and one row of numbers long; ignored rows are not read.
"""

from __future__ import annotations

import torch

from riskpo_kernels import reference
from riskpo_kernels.core.checks import (
    BACKENDS,
    check_choice,
    check_device,
    check_flags,
    check_float,
    check_ignore_index,
    check_options,
    check_shape,
    constant,
    live_rows,
    reject,
)
from riskpo_kernels.core.operators import no_autocast
from riskpo_kernels.lm_head.logits_operator import OP, logits_operator
from riskpo_kernels.reference import TokenLogProbs


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
        target: [...] integer ids, already shifted.
        ignore_index: the id of rows that do not count. They give 0 for every result and zero
            gradient, and their logits are never read. None: all rows count, the forward does not
            wait for the device (a CUDA graph can hold it), and ids are not checked: one outside
            the vocabulary gives log-prob -inf.
        temperature: above 0, a float or one per target; constant.
        softcap: logits become softcap * tanh(logits / softcap) before the temperature.
        return_entropy: also the entropy of that softmax.
        inplace_backward: the backward overwrites logits with their gradient, which saves the
            [..., V] buffer; a second backward then raises RuntimeError. Only for logits that
            nothing else needs. A compiled graph ignores it.
        backend: "auto", "triton", "torch" or "reference"; see backend_report().

    Returns:
        TokenLogProbs(logprob, entropy, lse), each [...], in nats, float32 (float64 for float64
        logits); as linear_logprob.

    Raises:
        ValueError: wrong shapes, dtypes, devices or values, or a backend that cannot run here.
    """
    temperature, softcap, ignore_index = map(constant, (temperature, softcap, ignore_index))
    check_float(OP, "logits", logits)
    check_device(OP, logits=logits, target=target)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        reject(OP, f"logits {list(logits.shape)}", "[..., V] with V > 0", "Pass whole rows.")
    check_shape(OP, "target", target, tuple(logits.shape[:-1]), "logits without its last dimension")
    check_options(OP, tuple(target.shape), logits.device, temperature=temperature, softcap=softcap)
    check_flags(OP, return_entropy=return_entropy, inplace_backward=inplace_backward)
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
    check_choice(OP, "backend", backend, BACKENDS)
    check_ignore_index(OP, ignore_index)
    flat = target.reshape(-1)
    if backend == "reference":
        live_rows(OP, flat, logits.shape[-1], ignore_index, temperature)
        with no_autocast(logits.device):
            return reference.logits_logprob(
                logits,
                target,
                temperature=temperature,
                softcap=softcap,
                return_entropy=return_entropy,
                ignore_index=ignore_index,
            )
    row_temperature = None
    if isinstance(temperature, torch.Tensor):
        row_temperature, temperature = temperature.reshape(-1), 1.0
    logprob, entropy, lse, *_ = logits_operator(
        logits if logits.stride(-1) == 1 else logits.contiguous(),
        flat,
        row_temperature,
        softcap,
        temperature,
        return_entropy,
        inplace_backward and not torch.compiler.is_compiling(),
        backend,
        ignore_index,
    )
    return TokenLogProbs(
        logprob.view(target.shape),
        entropy.view(target.shape) if return_entropy else None,
        lse.view(target.shape),
    )

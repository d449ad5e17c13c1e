"""What clipped_surrogate and sequence_logprob refuse, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from riskpo_kernels.core.checks import (
    FLOATS,
    check_choice,
    check_constant,
    check_device,
    check_float,
    check_positive,
    check_shape,
    describe,
    reject,
)
from riskpo_kernels.policy_loss.formulas import AGGREGATES, BOUND, KL, LOSSES

MASKS = (*FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Options:
    """The arguments of clipped_surrogate that are words and numbers, by their names there.

    settings are the loss's, in the order of its entry in LOSSES; a denominator that is a tensor
    stays out.
    """

    loss: str
    settings: list[float]
    ratio: str
    kl: str
    kl_coef: float
    entropy_coef: float
    aggregate: str
    constant: float | None
    denominator: float | None
    advantage_per: str | None
    correction_per: str | None
    off_policy_mask_threshold: float | None


WORDS = tuple(field.name for field in fields(Options))  # torch 2.11's Dynamo traces no vars()


def check_layout(
    op: str, logprob: object, cu_seqlens: torch.Tensor | None, mask: torch.Tensor | None
) -> int | None:
    """Flat [N] or padded [B, T] tokens; the number of sequences, None where nothing gives it."""
    check_float(op, "logprob", logprob)
    assert isinstance(logprob, torch.Tensor)  # check_float has seen to it
    if logprob.dim() not in (1, 2):
        came = f"logprob of shape {list(logprob.shape)}"
        reject(op, came, "flat [N] or padded [B, T]", "Reshape it.")
    check_device(op, logprob=logprob, cu_seqlens=cu_seqlens, mask=mask)
    if mask is not None:
        check_shape(op, "mask", mask, tuple(logprob.shape), "the shape of logprob")
        if mask.dtype not in MASKS:
            reject(op, f"mask = {describe(mask)}", "a bool, int or float mask", "Convert it.")
        check_constant(op, mask=mask)
    if logprob.dim() == 2:
        _check_padded(op, cu_seqlens, mask)
        return logprob.shape[0]
    if cu_seqlens is None:
        return None
    integer = cu_seqlens.dtype in (torch.int32, torch.int64)
    if not integer or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        came = f"cu_seqlens = {describe(cu_seqlens)}"
        reject(op, came, "int32 or int64 [S + 1]", "Build it with torch.cumsum over the lengths.")
    return len(cu_seqlens) - 1


def _check_padded(op: str, cu_seqlens: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    if cu_seqlens is not None:
        todo = "Flatten the tokens, or pass a mask instead of cu_seqlens."
        reject(op, "cu_seqlens with padded [B, T] log-probs", "cu_seqlens with flat [N]", todo)
    if mask is None:
        todo = "Pass torch.ones([B, T]) if every token counts."
        reject(op, "padded [B, T] log-probs without a mask", "a mask [B, T]", todo)


def check_bounds(op: str, cu_seqlens: torch.Tensor, n: int) -> None:
    """The values of cu_seqlens [S + 1] for n tokens."""
    bounds = cu_seqlens.tolist()  # the one transfer from the device
    todo = "Put 0 before the cumulative lengths of all sequences."
    if bounds[0] != 0:
        reject(op, f"cu_seqlens starting at {bounds[0]}", "a start at 0", todo)
    if bounds[-1] != n:
        reject(op, f"cu_seqlens ending at {bounds[-1]}", f"an end at {n} tokens", todo)
    for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if b < a:
            came = f"cu_seqlens falling from {a} to {b} at index {i + 1}"
            reject(op, came, "non-decreasing values", todo)


def settings_of(op: str, loss: str, ratio: str, given: Mapping[str, float]) -> list[float]:
    """The settings of a loss in its own order, the defaults where none is given."""
    check_choice(op, "loss", loss, tuple(LOSSES))
    check_choice(op, "ratio", ratio, tuple(BOUND))
    entry = LOSSES[loss]
    if ratio not in entry.ratios:
        reject(op, f"ratio={ratio!r} with loss={loss!r}", f"one of {list(entry.ratios)}", "Set it.")
    settings = entry.settings(ratio)
    for name, value in given.items():
        if name not in settings:
            todo = "Leave it out, or choose another loss."
            reject(op, f"{name} with loss={loss!r}", f"settings among {list(settings)}", todo)
        check_positive(op, name, value, zero_ok=name.startswith("clip_"))
        if name == "dual_clip" and value <= 1:
            todo = "It bounds ratios from above; 3 is usual."
            reject(op, f"dual_clip={value!r}", "a number above 1", todo)
    return [float(given.get(name, default)) for name, default in settings.items()]


def check_options(op: str, o: Options, denominator: torch.Tensor | None) -> None:
    """The words and the numbers, and the denominator where it is a tensor."""
    check_choice(op, "aggregate", o.aggregate, AGGREGATES)
    check_choice(op, "kl", o.kl, tuple(KL))
    check_positive(op, "kl_coef", o.kl_coef, zero_ok=True)
    for name, value in (
        ("entropy_coef", o.entropy_coef),
        ("off_policy_mask_threshold", o.off_policy_mask_threshold),
    ):
        fits = isinstance(value, (int, float)) and math.isfinite(value)
        if value is not None and not fits:
            reject(op, f"{name}={value!r}", "a finite number", f"Set {name}.")
    if o.constant is not None:
        check_positive(op, "constant", o.constant)
    elif o.aggregate == "sequence-sum-norm" and o.denominator is denominator is None:
        todo = "Dr. GRPO takes the longest response allowed, in tokens."
        reject(op, "aggregate='sequence-sum-norm' alone", "constant or denominator", todo)
    if denominator is not None and denominator.dim() != 0:
        came = f"denominator = {describe(denominator)}"
        reject(op, came, "a number or a 0-d tensor", "Sum the counts.")
    if o.denominator is not None:
        check_positive(op, "denominator", o.denominator, zero_ok=True)
    for name in ("advantage_per", "correction_per"):
        check_choice(op, name, getattr(o, name), (None, "sequence", "token"))


def check_tensors(
    op: str,
    o: Options,
    logprob: torch.Tensor,
    sequences: int | None,
    advantage: torch.Tensor,
    correction: torch.Tensor | None,
    prompt_tokens: torch.Tensor | None,
    denominator: torch.Tensor | None,
    **per_token: torch.Tensor | None,
) -> None:
    """Every other tensor; per_token: old_logprob, ref_logprob and entropy."""
    masked = o.off_policy_mask_threshold is not None
    if sequences is None and (o.ratio == "sequence" or o.aggregate != "token-mean" or masked):
        words = f"ratio={o.ratio!r}, aggregate={o.aggregate!r}"
        came = words + (" and off_policy_mask_threshold" if masked else "")
        todo = "Pass cu_seqlens [S + 1], or padded [B, T] with a mask."
        expected = "the sequences, which one of them needs"
        reject(op, f"{came} on flat tokens without cu_seqlens", expected, todo)
    if o.aggregate == "prompt-mean" and prompt_tokens is None:
        todo = "Count the tokens of all the responses to each sequence's prompt."
        reject(op, "aggregate='prompt-mean' alone", f"prompt_tokens [{sequences}]", todo)
    if prompt_tokens is not None and sequences is not None:
        check_shape(op, "prompt_tokens", prompt_tokens, (sequences,), "one per sequence")
    for name, x in per_token.items():
        if x is not None:
            check_float(op, name, x)
            check_shape(op, name, x, tuple(logprob.shape), "the shape of logprob")
    for coef, value, name in (
        ("kl_coef", o.kl_coef, "ref_logprob"),
        ("entropy_coef", o.entropy_coef, "entropy"),
    ):
        if value != 0 and per_token[name] is None:
            reject(op, f"{coef}={value!r} without {name}", name, f"Pass {name} or {coef}=0.")
    whose = logprob, sequences, o.advantage_per
    _check_weight(op, "advantage", advantage, *whose, per_token=o.ratio == "token")
    if correction is not None:
        whose = logprob, sequences, o.correction_per
        _check_weight(op, "correction", correction, *whose, per_token=True)
    others = {"advantage": advantage, "correction": correction, "denominator": denominator}
    others["prompt_tokens"] = prompt_tokens
    check_device(op, logprob=logprob, **others, **per_token)
    check_constant(op, **others, **{k: x for k, x in per_token.items() if k != "entropy"})


def _check_weight(
    op: str,
    name: str,
    x: torch.Tensor,
    logprob: torch.Tensor,
    sequences: int | None,
    given: str | None,
    *,
    per_token: bool,
) -> None:
    check_float(op, name, x)
    shapes = [] if sequences is None or given == "token" else [[sequences]]
    shapes += [list(logprob.shape)] if per_token and given != "sequence" else []
    if not shapes:
        known = "the sequences, by cu_seqlens or a mask" if per_token else "ratio='token'"
        reject(op, f"{name}_per={given!r}", known, "Pass them, or leave out the word.")
    if list(x.shape) not in shapes:
        todo = "" if per_token else " Only ratio='token' takes it per token."
        expected = " or ".join(str(shape) for shape in shapes)
        reject(op, f"{name} of shape {list(x.shape)}", expected, f"Reshape {name}.{todo}")

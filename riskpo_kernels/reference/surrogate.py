"""clipped_surrogate and sequence_logprob, as the papers write them; autograd does the gradients.

x_t = logprob_t - old_logprob_t                 "token"     PPO, DAPO arXiv 2503.14476
x_t = mean of the same over t's sequence        "sequence"  arXiv 2510.00911 sec. 4, GSPO 2507.18071
r_t = exp(clamp(x_t))                           clamp at +-20 (token), +-10 (sequence)
term_t = f(r_t, w_t A_t) + kl_coef KL_t - entropy_coef H_t
loss = sum_t weight_t term_t / denominator      over the counted tokens; weight_t is 1, or
                                                1 / length of t's sequence for "sequence-mean"

What has coefficient 0 is not read: a part of a term whose w_t A_t, kl_coef or entropy_coef is 0 is
0 even where its values are NaN, and so is w_t A_t where either is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from riskpo_kernels.reference import formulas
from riskpo_kernels.reference.ranks import largest, summed

BOUND = {"token": formulas.TOKEN_BOUND, "sequence": formulas.SEQUENCE_BOUND}
CLIP = {"token": (0.2, 0.2), "sequence": (3e-4, 4e-4)}
KL = {"k1": formulas.kl_k1, "k2": formulas.kl_k2, "k3": formulas.kl_k3}
AGGREGATES = ("sequence-mean", "token-mean", "sequence-sum", "sequence-sum-norm")


class SurrogateLoss(NamedTuple):
    """A scalar to minimise, and detached 0-d tensors on its device by name."""

    loss: torch.Tensor
    stats: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sequences:
    """Which of the `count` sequences each of the N flat tokens is in, and whether it counts. With
    a group every rank holds some of the tokens of the same sequences."""

    segment: torch.Tensor  # [N] int64
    counted: torch.Tensor  # [N] bool
    count: int
    lengths: torch.Tensor  # [S] int64, counted tokens of each sequence, over all ranks
    group: Any = None  # process group

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        mask: torch.Tensor | None,
        group: Any = None,
    ) -> Sequences:
        """From flat [N] (one sequence when there is no cu_seqlens) or padded [B, T] tokens."""
        if cu_seqlens is not None:
            lengths = cu_seqlens.long().diff()
        elif x.dim() == 2:
            lengths = torch.full((x.shape[0],), x.shape[1], device=x.device)
        else:
            lengths = torch.full((1,), x.shape[0], device=x.device)
        index = torch.arange(len(lengths), device=x.device)
        segment = index.repeat_interleave(lengths, output_size=x.numel())  # told: no sync
        everything = torch.ones(x.numel(), dtype=torch.bool, device=x.device)
        counted = everything if mask is None else mask.reshape(-1) != 0
        counts = torch.zeros_like(lengths).index_add(0, segment, counted.long())
        return cls(segment, counted, len(lengths), summed(counts, group), group)

    def tokens(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Tokens as flat [N]; 0 where they do not count, whatever stood there."""
        return torch.where(self.counted, x.reshape(-1).to(dtype), 0.0)

    def spread(self, x: torch.Tensor, dtype: torch.dtype, *, per_token: bool) -> torch.Tensor:
        """Per-sequence [S] or per-token values as flat [N]."""
        return self.tokens(x if per_token else x[self.segment], dtype)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Flat [N] to [S], over all ranks."""
        return self.over_ranks(x.new_zeros(self.count).index_add(0, self.segment, x))

    def over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' x."""
        return summed(x, self.group)

    def weight(self, *, mean: bool, dtype: torch.dtype) -> torch.Tensor:
        """Flat [N], 0 where not counted, else 1 or (`mean`) 1 / length of the token's sequence."""
        weight = self.counted.to(dtype)
        return weight / self.lengths.clamp(min=1).to(dtype)[self.segment] if mean else weight

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Flat [N] to [S]; 0 for a sequence without counted tokens."""
        return self.sum(x) / self.lengths.clamp(min=1).to(x.dtype)


def is_per_token(
    name: str,
    x: torch.Tensor,
    logprob: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    given: str | None,
    group: Any = None,
) -> bool:
    """Whether x has one value per token, not per sequence; `given` says so, else its shape.

    ValueError, on all ranks of a group, where S == N leaves both open. Without a group the two
    readings are one if every sequence is one token.
    """
    flat = logprob.dim() == 1
    if given is not None or (flat and cu_seqlens is None):
        return given != "sequence"
    count = logprob.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    per_sequence = x.shape == (count,)
    unclear = per_sequence and flat and count == len(logprob)
    if group is not None:
        unclear = bool(summed(torch.tensor(int(unclear), device=x.device), group) > 0)
    elif unclear and cu_seqlens is not None:
        unclear = not bool((cu_seqlens.diff() == 1).all())
    if unclear:
        raise ValueError(
            f"clipped_surrogate: got {name} {list(x.shape)} for as many sequences as tokens; "
            f"expected a word. Pass {name}_per='sequence' or {name}_per='token'."
        )
    return not per_sequence


def sequence_logprob(
    logprob: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    reduce: str = "sum",
) -> torch.Tensor:
    """Token log-probs, flat [N] or padded [B, T], to [S]; at least float32."""
    sequences = Sequences.of(logprob, cu_seqlens, mask)
    x = sequences.tokens(logprob, torch.promote_types(logprob.dtype, torch.float32))
    return sequences.mean(x) if reduce == "mean" else sequences.sum(x)


def default_denominator(
    aggregate: str, sequences: Sequences, constant: float | None
) -> torch.Tensor | float:
    """What the weighted sum of the terms is divided by."""
    if aggregate == "token-mean":
        return sequences.lengths.sum()
    if aggregate == "sequence-sum-norm" and constant is not None:
        return sequences.count * constant
    return sequences.count


def nonzero(denominator: torch.Tensor | float) -> torch.Tensor | float:
    """Where nothing counts on any rank, the global count is 0: the loss is 0, not NaN. Below 0 it
    is NaN: a tensor's value cannot be refused without waiting for the device."""
    if isinstance(denominator, torch.Tensor):
        sound = torch.where(denominator > 0, denominator, float("nan"))
        return torch.where(denominator == 0, 1.0, sound)
    return denominator or 1.0


def weighted(advantage: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Their product, 0 where either is 0, whatever the other is."""
    return torch.where((advantage == 0) | (weight == 0), 0.0, advantage * weight)


def clip_bounds(
    ratio: str, clip_low: float | None, clip_high: float | None, dual_clip: float | None
) -> tuple[float, float, float]:
    """(lower, upper, dual) of the ratio; the clips' defaults follow the kind of ratio."""
    low, high = CLIP[ratio]
    lower = 1 - (low if clip_low is None else clip_low)
    upper = 1 + (high if clip_high is None else clip_high)
    return lower, upper, formulas.DUAL_OFF if dual_clip is None else dual_clip


def clipped_surrogate(
    logprob: torch.Tensor,
    old_logprob: torch.Tensor,
    advantage: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    ratio: str = "sequence",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    correction: torch.Tensor | None = None,
    ref_logprob: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    aggregate: str = "sequence-mean",
    constant: float | None = None,
    denominator: float | torch.Tensor | None = None,
    advantage_per: str | None = None,
    correction_per: str | None = None,
    sequence_group: Any = None,
    backend: str = "reference",
) -> SurrogateLoss:
    """The equations above; riskpo_kernels.clipped_surrogate says what the arguments mean."""
    wide = torch.promote_types(logprob.dtype, torch.float32)
    sequences = Sequences.of(logprob, cu_seqlens, mask, sequence_group)
    old = sequences.tokens(old_logprob.detach(), wide)
    clip = clip_bounds(ratio, clip_low, clip_high, dual_clip)
    ref = None if ref_logprob is None else sequences.tokens(ref_logprob.detach(), wide)
    per = "sequence" if ratio == "sequence" else advantage_per
    where = logprob, cu_seqlens
    each = is_per_token("advantage", advantage, *where, given=per, group=sequence_group)
    a = sequences.spread(advantage, wide, per_token=each)
    if correction is not None:  # f is homogeneous in a: a weight of f is a weight of a
        per = correction_per
        each = is_per_token("correction", correction, *where, given=per, group=sequence_group)
        w = sequences.spread(correction.detach(), wide, per_token=each)
        a = weighted(a, sequences.mean(w)[sequences.segment] if ratio == "sequence" else w)
    weight = sequences.weight(mean=aggregate == "sequence-mean", dtype=wide)

    def policy_terms(new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = new - old
        x = sequences.mean(x)[sequences.segment] if ratio == "sequence" else x
        unread = (a == 0) & x.isnan()  # away before autograd multiplies it by 0
        r = torch.exp(formulas.bounded(torch.where(unread, 0.0, x), BOUND[ratio]))
        u = torch.zeros_like(new) if ref is None else ref - new
        divergence, _ = KL[kl](formulas.bounded(u, formulas.TOKEN_BOUND))
        f = formulas.surrogate(r, a, *clip)
        r = torch.where(unread, float("nan"), r.detach())
        return (f + kl_coef * divergence if kl_coef else f), r, divergence

    term, r, divergence = policy_terms(sequences.tokens(logprob, wide))
    unit = sequences.weight(mean=ratio == "sequence", dtype=wide)
    stats = _ratio_stats(r, a, clip, unit, sequences)
    with torch.enable_grad():
        leaf = sequences.tokens(logprob.detach(), wide).requires_grad_()
        (slope,) = torch.autograd.grad((weight * policy_terms(leaf)[0]).sum(), leaf)
    zero = (slope == 0) & ((weight * entropy_coef == 0) | (entropy is None))
    stats["zero_coefficient_fraction"] = _mean(zero.to(wide), sequences)
    if ref is not None:
        stats["kl"] = _mean(divergence, sequences, skip_nan=kl_coef == 0)
    if entropy is not None:
        h = sequences.tokens(entropy, wide)
        stats["entropy"] = _mean(h, sequences, skip_nan=entropy_coef == 0)
        term = term - entropy_coef * h if entropy_coef else term
    share = default_denominator(aggregate, sequences, constant)
    loss = (weight * term).sum() / nonzero(share if denominator is None else denominator)
    return SurrogateLoss(loss, stats)


def _mean(x: torch.Tensor, sequences: Sequences, *, skip_nan: bool = False) -> torch.Tensor:
    """Over the counted tokens; `skip_nan`: those of them that have a value."""
    seen = sequences.counted & ~x.isnan() if skip_nan else sequences.counted
    total = sequences.over_ranks(torch.where(seen, x.detach(), 0.0).sum())
    return total / sequences.over_ranks(seen.sum()).clamp(min=1)


def _ratio_stats(
    r: torch.Tensor,
    a: torch.Tensor,
    clip: tuple[float, float, float],
    unit: torch.Tensor,
    sequences: Sequences,
) -> dict[str, torch.Tensor]:
    """Shares of all units; the ratio's mean and maximum over those that have one or need one."""
    low, high, dual = formulas.cuts(r, a, *clip)
    seen = torch.where((a == 0) & r.isnan(), 0.0, unit)

    def mean(x: torch.Tensor, unit: torch.Tensor = unit) -> torch.Tensor:
        total = sequences.over_ranks(torch.where(unit > 0, unit * x, 0.0).sum())
        return total / sequences.over_ranks(unit.sum()).clamp(min=1)

    return {
        "clip_fraction": mean(low | high | dual),
        "clip_low_fraction": mean(low),
        "clip_high_fraction": mean(high),
        "ratio_mean": mean(r, seen),
        "ratio_max": largest(
            torch.where(seen > 0, r, 0.0).amax() if len(r) else r.sum(), sequences.group
        ),
        "tokens": sequences.lengths.sum(),
    }

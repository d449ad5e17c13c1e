"""clipped_surrogate and sequence_logprob, as the papers write them; autograd does the gradients.

x_t = logprob_t - old_logprob_t                 "token"     PPO, DAPO arXiv 2503.14476
x_t = mean of the same over t's sequence        "sequence"  arXiv 2510.00911 sec. 4, GSPO 2507.18071
r_t = exp(clamp(x_t))                           clamp at +-20 (token), +-10 (sequence)
term_t = f(r_t, w_t A_t) + kl_coef KL_t - entropy_coef H_t
loss = sum_t weight_t term_t / denominator      over the counted tokens; weight_t is 1, or
                                                1 / length of t's sequence for "sequence-mean"
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

    def spread(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Per-sequence [S] or per-token values as flat [N]; [S] wins where S == N."""
        per_sequence = x.dim() == 1 and len(x) == self.count
        return self.tokens(x[self.segment] if per_sequence else x, dtype)

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
    """Where nothing counts on any rank, the global count is 0: the loss is 0, not NaN."""
    if isinstance(denominator, torch.Tensor):
        return torch.where(denominator == 0, 1, denominator)
    return denominator or 1.0


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
    sequence_group: Any = None,
    backend: str = "reference",
) -> SurrogateLoss:
    """The equations above; riskpo_kernels.clipped_surrogate says what the arguments mean."""
    wide = torch.promote_types(logprob.dtype, torch.float32)
    sequences = Sequences.of(logprob, cu_seqlens, mask, sequence_group)
    old = sequences.tokens(old_logprob.detach(), wide)
    clip = clip_bounds(ratio, clip_low, clip_high, dual_clip)
    ref = None if ref_logprob is None else sequences.tokens(ref_logprob.detach(), wide)
    a = sequences.spread(advantage, wide)
    if correction is not None:  # f is homogeneous in a: a weight of f is a weight of a
        w = sequences.spread(correction.detach(), wide)
        a = a * (sequences.mean(w)[sequences.segment] if ratio == "sequence" else w)
    weight = sequences.weight(mean=aggregate == "sequence-mean", dtype=wide)

    def policy_terms(new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = new - old
        x = sequences.mean(x)[sequences.segment] if ratio == "sequence" else x
        r = torch.exp(formulas.bounded(x, BOUND[ratio]))
        u = torch.zeros_like(new) if ref is None else ref - new
        divergence, _ = KL[kl](formulas.bounded(u, formulas.TOKEN_BOUND))
        return formulas.surrogate(r, a, *clip) + kl_coef * divergence, r, divergence

    term, r, divergence = policy_terms(sequences.tokens(logprob, wide))
    unit = sequences.weight(mean=ratio == "sequence", dtype=wide)
    stats = _ratio_stats(r.detach(), formulas.cuts(r, a, *clip), unit, sequences)
    with torch.enable_grad():
        leaf = sequences.tokens(logprob.detach(), wide).requires_grad_()
        (slope,) = torch.autograd.grad((weight * policy_terms(leaf)[0]).sum(), leaf)
    zero = (slope == 0) & ((weight * entropy_coef == 0) | (entropy is None))
    stats["zero_coefficient_fraction"] = _mean(zero.to(wide), sequences)
    if ref is not None:
        stats["kl"] = _mean(divergence, sequences)
    if entropy is not None:
        h = sequences.tokens(entropy, wide)
        stats["entropy"] = _mean(h, sequences)
        term = term - entropy_coef * h if entropy_coef else term
    share = default_denominator(aggregate, sequences, constant)
    loss = (weight * term).sum() / nonzero(share if denominator is None else denominator)
    return SurrogateLoss(loss, stats)


def _mean(x: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    total = sequences.over_ranks(torch.where(sequences.counted, x.detach(), 0.0).sum())
    return total / sequences.lengths.sum().clamp(min=1)


def _ratio_stats(
    r: torch.Tensor,
    cut: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    unit: torch.Tensor,
    sequences: Sequences,
) -> dict[str, torch.Tensor]:
    low, high, dual = cut
    units = sequences.over_ranks(unit.sum()).clamp(min=1)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return sequences.over_ranks((unit * x).sum()) / units

    return {
        "clip_fraction": mean(low | high | dual),
        "clip_low_fraction": mean(low),
        "clip_high_fraction": mean(high),
        "ratio_mean": mean(r),
        "ratio_max": largest(
            torch.where(unit > 0, r, 0.0).amax() if len(r) else r.sum(), sequences.group
        ),
        "tokens": sequences.lengths.sum(),
    }

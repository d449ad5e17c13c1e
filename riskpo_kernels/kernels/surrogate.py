"""The one pass of clipped_surrogate as a single kernel: loss, slopes and stats per sequence.

x_t = logprob_t - old_t (token), or its mean over the sequence (sequence);  r = exp(bounded(x))
term_t = f(r, a) + kl_coef kl(ref - logprob) - entropy_coef entropy;        f, kl: formulas.py
dlogprob_t = weight (df/dx_t + kl_coef dkl/dlogprob_t),  dentropy_t = -weight entropy_coef,
weight = 1, or 1 / counted tokens of the sequence. Nothing is divided by the denominator yet.

N tokens, S sequences
logprob, old, ref, entropy, dlogprob, dentropy   [N] fp32      mask [N] uint8, nonzero counts
advantage   [S] or [N] fp32                      cu [S + 1] int64
partial     [S, 13] fp32: weighted terms | counts: tokens | sums over tokens: kl, those with a
            kl, entropy, those with one, zero slopes, cut low, high, any, r, those with one |
            maximum of r

What has coefficient 0 (kl_coef, entropy_coef, a) is not read into the loss, and where it is NaN not
into a sum either.

Cost: 16 to 28 bytes per token (the sequence ratio reads logprob and old twice, the second time
from L2), about 30 FLOPs; eager PyTorch moves some 40 arrays. One program walks one sequence, so
sums have a fixed order and need no atomics. All sizes come from cu: nothing to specialise on.
"""

from __future__ import annotations

import itertools
from types import FunctionType
from typing import Any

import torch
import triton
import triton.language as tl

from riskpo_kernels.kernels import Configuration
from riskpo_kernels.reference import formulas


def _for_triton(function: Any) -> Any:
    """The same code object with triton.language as `tl`; `torch` serves the annotations only."""
    names = {"tl": tl, "torch": torch, "__name__": __name__}
    return triton.jit(FunctionType(function.__code__, names, function.__name__))


bounded = _for_triton(formulas.bounded)
saturated = _for_triton(formulas.saturated)
surrogate = _for_triton(formulas.surrogate)
surrogate_slope = _for_triton(formulas.surrogate_slope)
cuts = _for_triton(formulas.cuts)
kl_k1 = _for_triton(formulas.kl_k1)
kl_k2 = _for_triton(formulas.kl_k2)
kl_k3 = _for_triton(formulas.kl_k3)

TOKEN_BOUND = tl.constexpr(formulas.TOKEN_BOUND)
SEQUENCE_BOUND = tl.constexpr(formulas.SEQUENCE_BOUND)
COLUMNS = 13
KL_KINDS = {"none": 0, "k1": 1, "k2": 2, "k3": 3}

# 512 tokens are 4 per thread, with the running sums in registers; most responses are a few blocks.
# The bound on registers is generous on purpose: without one ptxas spills a word in some
# configurations to fit one more block on a multiprocessor.
BLOCK = 512
NUM_WARPS = 4
NUM_STAGES = 1  # nothing to pipeline: no dot waits for these loads
MAX_REGISTERS = 168

POINTERS = {
    "p_logprob": "*fp32",
    "p_old": "*fp32",
    "p_advantage": "*fp32",
    "p_ref": "*fp32",
    "p_entropy": "*fp32",
    "p_mask": "*u8",
    "p_cu": "*i64",
    "o_dlogprob": "*fp32",
    "o_dentropy": "*fp32",
    "o_partial": "*fp32",
}
FLAGS = {"advantage_per_token": "i32", "sequence_mean": "i32"}
FLOATS = {n: "fp32" for n in ("lower", "upper", "dual", "kl_coef", "entropy_coef")}


@triton.jit
def length_and_mean(
    p_logprob,
    p_old,
    p_mask,
    start,
    n,
    SEQUENCE_RATIO: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counted tokens of one sequence, the same but at least 1, and the mean of their log-ratios
    (0 for the token ratio)."""
    b_count = tl.full([BLOCK], 0.0, tl.float32)
    b_total = tl.full([BLOCK], 0.0, tl.float32)
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        m = i < n
        if HAS_MASK:
            m = m & (tl.load(p_mask + start + i, mask=m, other=0) != 0)
        b_count += tl.where(m, 1.0, 0.0)
        if SEQUENCE_RATIO:
            new = tl.load(p_logprob + start + i, mask=m, other=0.0)
            b_total += new - tl.load(p_old + start + i, mask=m, other=0.0)
    count = tl.sum(b_count, 0)
    length = tl.where(count > 0.0, count, 1.0)
    return count, length, tl.sum(b_total, 0) / length


@triton.jit
def divergence(u, KL: tl.constexpr):
    """KL estimate and its slope; 0 and 0 or 1 where u = 0, as at tokens that do not count."""
    v = bounded(u, TOKEN_BOUND)
    if KL == 1:
        value, slope = kl_k1(v)
    elif KL == 2:
        value, slope = kl_k2(v)
    else:
        value, slope = kl_k3(v)
    return value, tl.where(saturated(u, TOKEN_BOUND), 0.0, slope)


# A sequence may start at any token, so nobody gains from aligned pointers; without these two
# lists every new alignment or flag would compile the kernel again.
@triton.jit(do_not_specialize=list(FLAGS), do_not_specialize_on_alignment=list(POINTERS))
def surrogate_kernel(
    p_logprob,
    p_old,
    p_advantage,
    p_ref,
    p_entropy,
    p_mask,
    p_cu,
    o_dlogprob,
    o_dentropy,
    o_partial,
    advantage_per_token,
    sequence_mean,
    lower,
    upper,
    dual,
    kl_coef,
    entropy_coef,
    SEQUENCE_RATIO: tl.constexpr,
    KL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    start = tl.load(p_cu + s)
    n = (tl.load(p_cu + s + 1) - start).to(tl.int32)  # tokens here; those before are int64
    p_a = p_advantage + tl.where(advantage_per_token != 0, start, s)

    count, length, mean = length_and_mean(
        p_logprob, p_old, p_mask, start, n, SEQUENCE_RATIO, HAS_MASK, BLOCK
    )
    weight = tl.where(sequence_mean != 0, 1.0 / length, 1.0)
    nil = tl.full([BLOCK], 0.0, tl.float32)
    b_loss, b_kl, b_kls, b_h, b_hs, b_zero = nil, nil, nil, nil, nil, nil
    b_low, b_high, b_cut, b_r, b_rs, b_max = nil, nil, nil, nil, nil, nil
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < n
        m = inside
        if HAS_MASK:
            m = m & (tl.load(p_mask + start + i, mask=inside, other=0) != 0)
        new = tl.load(p_logprob + start + i, mask=m, other=0.0)
        a = tl.load(p_a + i * advantage_per_token, mask=m, other=0.0)

        if SEQUENCE_RATIO:
            x, bound = mean + nil, SEQUENCE_BOUND
        else:
            x, bound = new - tl.load(p_old + start + i, mask=m, other=0.0), TOKEN_BOUND
        r = tl.exp(bounded(x, bound))
        low, high, far = cuts(r, a, lower, upper, dual)
        cut = low | high | far
        term = surrogate(r, a, lower, upper, dual)
        slope = surrogate_slope(r, a, cut | saturated(x, bound))
        if KL != 0:
            kl, kl_slope = divergence(tl.load(p_ref + start + i, mask=m, other=0.0) - new, KL)
            term += tl.where(kl_coef != 0.0, kl_coef * kl, 0.0)
            slope += tl.where(kl_coef != 0.0, kl_coef * kl_slope, 0.0)
            seen = m & ((kl_coef != 0.0) | (kl == kl))
            b_kl += tl.where(seen, kl, 0.0)
            b_kls += tl.where(seen, 1.0, 0.0)
        dlogprob = tl.where(m, weight * slope, 0.0)
        zero = dlogprob == 0.0
        if HAS_ENTROPY:
            h = tl.load(p_entropy + start + i, mask=m, other=0.0)
            term -= tl.where(entropy_coef != 0.0, entropy_coef * h, 0.0)
            seen = m & ((entropy_coef != 0.0) | (h == h))
            b_h += tl.where(seen, h, 0.0)
            b_hs += tl.where(seen, 1.0, 0.0)
            dentropy = tl.where(m, -weight * entropy_coef, 0.0)
            zero = zero & (dentropy == 0.0)
            tl.store(o_dentropy + start + i, dentropy, mask=inside)
        tl.store(o_dlogprob + start + i, dlogprob, mask=inside)

        b_loss += tl.where(m, weight * term, 0.0)
        b_zero += tl.where(m & zero, 1.0, 0.0)
        b_low += tl.where(m & low, 1.0, 0.0)
        b_high += tl.where(m & high, 1.0, 0.0)
        b_cut += tl.where(m & cut, 1.0, 0.0)
        seen = m & ((a != 0.0) | (r == r))
        b_r += tl.where(seen, r, 0.0)
        b_rs += tl.where(seen, 1.0, 0.0)
        b_max = tl.where(seen & (r > b_max), r, b_max)

    o = o_partial + s * 13
    tl.store(o, tl.sum(b_loss, 0))
    tl.store(o + 1, count)
    tl.store(o + 2, tl.sum(b_kl, 0))
    tl.store(o + 3, tl.sum(b_kls, 0))
    tl.store(o + 4, tl.sum(b_h, 0))
    tl.store(o + 5, tl.sum(b_hs, 0))
    tl.store(o + 6, tl.sum(b_zero, 0))
    tl.store(o + 7, tl.sum(b_low, 0))
    tl.store(o + 8, tl.sum(b_high, 0))
    tl.store(o + 9, tl.sum(b_cut, 0))
    sum_r = tl.sum(b_r, 0)
    tl.store(o + 10, sum_r)
    tl.store(o + 11, tl.sum(b_rs, 0))
    tl.store(o + 12, tl.where(sum_r == sum_r, tl.max(b_max, 0), sum_r))  # a NaN stays one


def surrogate_pass(
    logprob: torch.Tensor,
    old: torch.Tensor,
    advantage: torch.Tensor,
    ref: torch.Tensor | None,
    entropy: torch.Tensor | None,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    *,
    advantage_per_token: bool,
    sequence_ratio: bool,
    sequence_mean: bool,
    clip: tuple[float, float, float],
    kl: str,
    kl_coef: float,
    entropy_coef: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(dlogprob [N], dentropy [N] or None, partial [S, 13]); N and S at least 1, any strides."""
    dlogprob = torch.empty(logprob.shape, dtype=torch.float32, device=logprob.device)
    dentropy = None if entropy is None else torch.empty_like(dlogprob)
    programs = len(cu_seqlens) - 1
    partial = torch.empty(programs, COLUMNS, dtype=torch.float32, device=logprob.device)
    lower, upper, dual = map(float, clip)  # an int 1 would be compiled in

    def plain(x: torch.Tensor | None) -> torch.Tensor:  # an absent input's pointer is never read
        return logprob if x is None else x.to(torch.float32).contiguous()

    logprob = plain(logprob)
    with torch.cuda.device_of(logprob):
        surrogate_kernel[(programs,)](
            p_logprob=logprob,
            p_old=plain(old),
            p_advantage=plain(advantage),
            p_ref=plain(ref),
            p_entropy=plain(entropy),
            p_mask=(logprob if mask is None else mask.contiguous()).view(torch.uint8),
            p_cu=cu_seqlens,
            o_dlogprob=dlogprob,
            o_dentropy=dlogprob if dentropy is None else dentropy,
            o_partial=partial,
            advantage_per_token=int(advantage_per_token),
            sequence_mean=int(sequence_mean),
            lower=lower,
            upper=upper,
            dual=dual,
            kl_coef=float(kl_coef),
            entropy_coef=float(entropy_coef),
            SEQUENCE_RATIO=sequence_ratio,
            KL=KL_KINDS["none" if ref is None else kl],
            HAS_ENTROPY=entropy is not None,
            HAS_MASK=mask is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
            maxnreg=MAX_REGISTERS,
        )
    return dlogprob, dentropy, partial


def compile_configurations() -> list[Configuration]:
    """Everything that can be launched: see kernels/__init__.py."""
    flags = ("SEQUENCE_RATIO", "KL", "HAS_ENTROPY", "HAS_MASK", "BLOCK")
    signature = POINTERS | FLAGS | FLOATS | dict.fromkeys(flags, "constexpr")
    configurations = []
    for ratio, kl, entropy, mask in itertools.product(
        ("token", "sequence"), KL_KINDS, (False, True), (False, True)
    ):
        name = f"surrogate {ratio} kl={kl} entropy={entropy:d} mask={mask:d}"
        values = (ratio == "sequence", KL_KINDS[kl], entropy, mask, BLOCK)
        constexprs = dict(zip(flags, values, strict=True))
        launch = (NUM_WARPS, NUM_STAGES, {"maxnreg": MAX_REGISTERS})
        configurations.append(Configuration(name, surrogate_kernel, signature, constexprs, *launch))
    return configurations

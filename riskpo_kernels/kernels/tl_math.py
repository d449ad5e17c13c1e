"""Device mathematics shared by the kernels: values in, values out."""

import math

import triton
import triton.language as tl

LOG2E, LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-1.0e30)  # stands for -inf where arithmetic follows: 0 * -inf is NaN


@triton.jit
def at_least(x, floor):
    # a NaN stays one: the device's plain maximum gives the other operand
    return tl.maximum(x, floor, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh(x):
    # libdevice is absent from the interpreter. Odd series where the quotient would cancel.
    y = x * x
    high = 62.0 / 2835.0 + y * (-1382.0 / 155925.0 + y * (21844.0 / 6081075.0))
    series = x * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * high))))
    e = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - e) / (1.0 + e)
    return tl.where(y < 0.25, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def log1p(x):
    # of x in [0, 1], exact to rounding: the quotient undoes the rounding of 1 + x
    y = 1.0 + x
    d = y - 1.0
    return tl.where(d == 0, x, tl.log(y) * (x / tl.where(d == 0, 1.0, d)))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def logits_of(x, inner, outer):
    # z and the softcap's slope, of core/softmax.py's LogitMap.factors
    slope = tl.full(x.shape, 1.0, tl.float32)
    if inner is not None:
        x = tanh(x * inner)
        slope = 1.0 - x * x
    return x * outer, slope


@triton.jit
def logits_gradient(log_p, taken, at_target, offset, slope, FLOOR: tl.constexpr):
    # dz [R, C] of core/gradient.py's three numbers a row, [R]; taken marks the target
    log_p = at_least(log_p, FLOOR)  # 0 * -inf is NaN
    by_mass = offset[:, None]
    if slope is not None:
        by_mass += slope[:, None] * log_p
    return tl.where(taken, at_target[:, None], -tl.exp(log_p) * by_mass)


@triton.jit
def row_results(m, d, s, u, z_t):
    # core/softmax.py's finish, given d = m - z_t: logprob, entropy, peak, log_sum, 1 - p_target
    log_s = tl.log(s)
    d = tl.where(s == 0, float("-inf"), d + log_s)
    over, under = softplus(d), softplus(-d)
    log_sum = tl.where(z_t >= m, over, log_s + under)
    e = tl.exp(-tl.abs(d))
    q = tl.where(d < 0, e, 1.0) / (1.0 + e)
    rest = tl.where(s == 0, 0.0, at_least(log_s - u / s, 0.0))
    known = tl.where(over > 1000.0, 1000.0, over)  # 0 * inf where the target is certain
    against = tl.where(under > 1000.0, 1000.0, under)
    entropy = tl.exp(-over) * known + q * (against + rest)
    return -over, entropy, tl.maximum(m, z_t), log_sum, q

"""Device mathematics shared by the kernels: values in, values out."""

import triton
import triton.language as tl


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
def logits_of(x, scale, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    # z and softcap'(scale * x), for z = softcap(scale * x) / temperature
    x = x * scale
    slope = tl.full(x.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        th = tanh(x / softcap)
        slope = 1.0 - th * th
        x = th * softcap
    return x / temperature, slope


@triton.jit
def logits_gradient(
    log_p, taken, at_target, offset, slope, HAS_SLOPE: tl.constexpr, FLOOR: tl.constexpr
):
    # dz [R, C] of softmax_rows.RowGradient's three numbers a row, [R]; taken marks the target
    log_p = at_least(log_p, FLOOR)  # 0 * -inf is NaN
    by_mass = offset[:, None]
    if HAS_SLOPE:
        by_mass += slope[:, None] * log_p
    return tl.where(taken, at_target[:, None], -tl.exp(log_p) * by_mass)


@triton.jit
def online_softmax(z, taken, here, m, s, u, zt, ENTROPY: tl.constexpr, FLOOR: tl.constexpr):
    # tile z [R, C] into m, s, u, z_t [R], the target kept out of the sums (lm_head/softmax.py);
    # taken marks the target, here the rows that have it in this tile. Also gives e^(z - anchor)
    # and the anchor.
    zt = tl.where(here, tl.sum(tl.where(taken, z, 0.0), 1), zt)  # a NaN stays one
    z = tl.where(taken, float("-inf"), z)
    new_m = tl.maximum(m, tl.max(z, 1))
    anchor = tl.where(new_m == float("-inf"), 0.0, new_m)  # -inf - -inf is NaN
    shift = tl.maximum(m - anchor, FLOOR)  # exp(FLOOR) = 0, and 0 * FLOOR is not NaN
    keep = tl.exp(shift)
    z = at_least(z - anchor[:, None], FLOOR)
    e = tl.exp(z)
    if ENTROPY:
        u = keep * (u + s * shift) + tl.sum(e * z, 1)
    s = s * keep + tl.sum(e, 1)
    return new_m, s, u, zt, e, anchor

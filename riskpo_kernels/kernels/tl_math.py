"""Device mathematics shared by the kernels: values in, values out."""

import triton
import triton.language as tl


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
def one_minus_exp(log_p):
    # series where the difference would cancel
    x = -log_p
    tail = 1.0 / 24.0 - x * (1.0 / 120.0 - x * (1.0 / 720.0))
    series = x * (1.0 - x * (0.5 - x * (1.0 / 6.0 - x * tail)))
    return tl.where(x < 0.25, series, 1.0 - tl.exp(log_p))

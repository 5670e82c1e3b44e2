"""The fused activations and their derivatives, by their codes in `activations.FUSED`."""

from __future__ import annotations

import triton
import triton.language as tl

from compacter_kernels.activations import FUSED

_NAMES = ("identity", "relu", "gelu", "gelu_new", "silu", "tanh", "sigmoid", "leakyrelu", "mish", "relu2", "quick_gelu")
_CODES = (tl.constexpr(FUSED[name].code) for name in _NAMES)
IDENTITY, RELU, GELU, GELU_NEW, SILU, TANH, SIGMOID, LEAKYRELU, MISH, RELU2, QUICK_GELU = _CODES
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)
SLOPE = tl.constexpr(0.01)
QUICK = tl.constexpr(1.702)


@triton.jit
def _tanh(y):
    # (1 - e^-2|y|) / (1 + e^-2|y|) with the sign of y. Near 0, where the difference loses digits,
    # the Taylor series.
    e = tl.exp(-2.0 * tl.abs(y))
    t = (1.0 - e) / (1.0 + e)
    x = y * y
    small = y + y * x * (-1.0 / 3.0 + x * (2.0 / 15.0 + x * (-17.0 / 315.0 + x * (62.0 / 2835.0))))
    return tl.where(x < 0.0625, small, tl.where(y < 0.0, -t, t))


@triton.jit
def _gelu_new_argument(y):
    # the z of 0.5 (1 + tanh(z / 2)) = sigmoid(z); tanh would lose digits near -1 and 0
    return (y + y * y * y * CUBIC) * (2.0 * SQRT_2_OVER_PI)


@triton.jit
def _tanh_softplus(y):
    # tanh(log(1 + w)) = (w^2 + 2w) / (w^2 + 2w + 2) with w = e^y; it is 1 in float32 from y = 20 on
    w = tl.exp(tl.where(y > 20.0, 20.0, y))
    s = w * (w + 2.0)
    return s / (s + 2.0)


@triton.jit
def activate(y, CODE: tl.constexpr):
    """act(y), elementwise, float32. It uses no max or min, so that a NaN stays one."""
    if CODE == IDENTITY:
        h = y
    elif CODE == RELU:
        h = tl.where(y <= 0.0, 0.0, y)
    elif CODE == GELU:
        h = 0.5 * y * (1.0 + tl.erf(y * SQRT_HALF))
    elif CODE == GELU_NEW:
        h = y * tl.sigmoid(_gelu_new_argument(y))
    elif CODE == SILU:
        h = y * tl.sigmoid(y)
    elif CODE == TANH:
        h = _tanh(y)
    elif CODE == SIGMOID:
        h = tl.sigmoid(y)
    elif CODE == LEAKYRELU:
        h = tl.where(y <= 0.0, y * SLOPE, y)
    elif CODE == MISH:
        h = y * _tanh_softplus(y)
    elif CODE == RELU2:
        h = tl.where(y <= 0.0, 0.0, y * y)
    else:
        tl.static_assert(CODE == QUICK_GELU)
        h = y * tl.sigmoid(y * QUICK)
    return h


@triton.jit
def derivative(y, CODE: tl.constexpr):
    """act'(y), elementwise, float32. At 0 it is what torch has: 0, and the slope for leakyrelu."""
    if CODE == IDENTITY:
        d = tl.full(y.shape, 1.0, tl.float32)
    elif CODE == RELU:
        d = tl.where(y <= 0.0, 0.0, 1.0)
    elif CODE == GELU:
        d = 0.5 * (1.0 + tl.erf(y * SQRT_HALF)) + y * INV_SQRT_2PI * tl.exp(-0.5 * y * y)
    elif CODE == GELU_NEW:
        s = tl.sigmoid(_gelu_new_argument(y))
        q = y * s * (1.0 - s)
        # q times the sum would take up to 70 registers more, and spill
        d = s + q * (2.0 * SQRT_2_OVER_PI) + q * (y * y * (6.0 * CUBIC * SQRT_2_OVER_PI))
    elif CODE == SILU:
        s = tl.sigmoid(y)
        d = s * (1.0 + y * (1.0 - s))
    elif CODE == TANH:
        t = _tanh(y)
        d = 1.0 - t * t
    elif CODE == SIGMOID:
        s = tl.sigmoid(y)
        d = s * (1.0 - s)
    elif CODE == LEAKYRELU:
        d = tl.where(y > 0.0, 1.0, SLOPE)
    elif CODE == MISH:
        t = _tanh_softplus(y)
        d = t + y * tl.sigmoid(y) * (1.0 - t * t)
    elif CODE == RELU2:
        d = tl.where(y <= 0.0, 0.0, 2.0 * y)
    else:
        tl.static_assert(CODE == QUICK_GELU)
        s = tl.sigmoid(y * QUICK)
        d = s + y * s * (1.0 - s) * QUICK
    return d

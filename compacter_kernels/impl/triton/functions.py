"""The fused activations and their derivatives in Triton, by the numbers of `compacter_kernels.activations.FUSED`."""

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
def _sigmoid(y):
    return 1.0 / (1.0 + tl.exp(-y))


@triton.jit
def _tanh(y):
    # 1 - 2 / (1 + e^2y): right at both ends, where e^2y is 0 or Inf
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * y))


@triton.jit
def _tanh_softplus(y):
    # tanh(log(1 + w)) = (w^2 + 2w) / (w^2 + 2w + 2) with w = e^y; 1 in float32 from y = 20 on
    w = tl.exp(tl.where(y > 20.0, 20.0, y))
    s = w * (w + 2.0)
    return s / (s + 2.0)


@triton.jit
def activate(y, CODE: tl.constexpr):
    """act(y), elementwise, float32. A NaN stays one: no max or min is taken."""
    if CODE == IDENTITY:
        h = y
    elif CODE == RELU:
        h = tl.where(y <= 0.0, 0.0, y)
    elif CODE == GELU:
        h = 0.5 * y * (1.0 + tl.erf(y * SQRT_HALF))
    elif CODE == GELU_NEW:
        h = 0.5 * y * (1.0 + _tanh((y + y * y * y * CUBIC) * SQRT_2_OVER_PI))
    elif CODE == SILU:
        h = y * _sigmoid(y)
    elif CODE == TANH:
        h = _tanh(y)
    elif CODE == SIGMOID:
        h = _sigmoid(y)
    elif CODE == LEAKYRELU:
        h = tl.where(y <= 0.0, y * SLOPE, y)
    elif CODE == MISH:
        h = y * _tanh_softplus(y)
    elif CODE == RELU2:
        h = tl.where(y <= 0.0, 0.0, y * y)
    else:
        tl.static_assert(CODE == QUICK_GELU)
        h = y * _sigmoid(y * QUICK)
    return h


@triton.jit
def derivative(y, CODE: tl.constexpr):
    """act'(y), elementwise, float32; as torch has it at the kinks (0 at 0, and the slope for leakyrelu)."""
    if CODE == IDENTITY:
        d = tl.full(y.shape, 1.0, tl.float32)
    elif CODE == RELU:
        d = tl.where(y <= 0.0, 0.0, 1.0)
    elif CODE == GELU:
        d = 0.5 * (1.0 + tl.erf(y * SQRT_HALF)) + y * INV_SQRT_2PI * tl.exp(-0.5 * y * y)
    elif CODE == GELU_NEW:
        t = _tanh((y + y * y * y * CUBIC) * SQRT_2_OVER_PI)
        d = 0.5 * (1.0 + t) + 0.5 * y * (1.0 - t * t) * SQRT_2_OVER_PI * (1.0 + y * y * (3.0 * CUBIC))
    elif CODE == SILU:
        s = _sigmoid(y)
        d = s * (1.0 + y * (1.0 - s))
    elif CODE == TANH:
        t = _tanh(y)
        d = 1.0 - t * t
    elif CODE == SIGMOID:
        s = _sigmoid(y)
        d = s * (1.0 - s)
    elif CODE == LEAKYRELU:
        d = tl.where(y <= 0.0, SLOPE, 1.0)
    elif CODE == MISH:
        t = _tanh_softplus(y)
        d = t + y * _sigmoid(y) * (1.0 - t * t)
    elif CODE == RELU2:
        d = tl.where(y <= 0.0, 0.0, 2.0 * y)
    else:
        tl.static_assert(CODE == QUICK_GELU)
        s = _sigmoid(y * QUICK)
        d = s * (1.0 + y * QUICK * (1.0 - s))
    return d

// The activations, value and slope in fp32. They do not use max(x, 0), so that NaN stays NaN.
#pragma once

#include "../adapter.h"
#include "ptx.h"

namespace compacter::cuda {

struct ValueAndSlope {
    float value, slope;
};

// sigma(y) = 1 / (1 + e^-y), slope = e / (1 + e)^2, e = exp(-|y|); sigma (1 - sigma) would cancel
COMPACTER_DEVICE ValueAndSlope sigmoid(float y) {
    const float e = expf(-fabsf(y)), below = reciprocal(1.f + e);
    return {y < 0.f ? e * below : below, e * below * below};
}

// y sigma(c y), slope = sigma + c y sigma'
COMPACTER_DEVICE ValueAndSlope swish(float y, float c) {
    const ValueAndSlope s = sigmoid(c * y);
    return {y * s.value, s.value + (s.slope == 0.f ? 0.f : c * y * s.slope)};
}

// 0.5 y (1 + tanh(a (y + b y^3))) = y sigma(2 a (y + b y^3)), a = sqrt(2 / pi), b = 0.044715
COMPACTER_DEVICE ValueAndSlope gelu_new(float y) {
    constexpr float a2 = 2.f * 0.7978845608f, b = 0.044715f;
    const ValueAndSlope s = sigmoid(y * (y * y * (a2 * b) + a2));
    return {y * s.value, s.value + (s.slope == 0.f ? 0.f : y * s.slope * (y * y * (3.f * a2 * b) + a2))};
}

// y Phi(y), Phi(y) = erfc(-y / sqrt 2) / 2, slope = Phi(y) + y exp(-y^2 / 2) / sqrt(2 pi)
COMPACTER_DEVICE ValueAndSlope gelu(float y) {
    const float phi = 0.5f * erfcf(y * -0.707106781f), density = expf(-0.5f * y * y);
    return {y * phi, phi + (density == 0.f ? 0.f : y * density * 0.398942280f)};
}

// y tanh(log(1 + e^y)) = y w / (w + 2), e = e^y, w = e (e + 2);
// slope = w / (w + 2) + 4 y e (e + 1) / (w + 2)^2
COMPACTER_DEVICE ValueAndSlope mish(float y) {
    const float e = expf(y > 20.f ? 20.f : y), w = e * (e + 2.f), below = 1.f / (w + 2.f);
    const float rise = y > 20.f ? 0.f : 4.f * e * (e + 1.f) * below * below;
    return {y * (w * below), w * below + (rise == 0.f ? 0.f : y * rise)};
}

COMPACTER_DEVICE ValueAndSlope tanh_and_slope(float y) {
    const float e = expf(-2.f * fabsf(y)), below = reciprocal(1.f + e);
    return {tanhf(y), 4.f * e * below * below};
}

// Calls body(function) with the function of an activation, so that a loop over many numbers chooses once.
template <class Body>
COMPACTER_DEVICE void with_activation(Activation activation, const Body& body) {
    switch (activation) {
        case Activation::relu: return body([](float y) { return ValueAndSlope{y < 0.f ? 0.f : y, y <= 0.f ? 0.f : 1.f}; });
        case Activation::gelu: return body([](float y) { return gelu(y); });
        case Activation::gelu_new: return body([](float y) { return gelu_new(y); });
        case Activation::silu: return body([](float y) { return swish(y, 1.f); });
        case Activation::tanh: return body([](float y) { return tanh_and_slope(y); });
        case Activation::sigmoid: return body([](float y) { return sigmoid(y); });
        case Activation::leaky_relu:
            return body([](float y) { return ValueAndSlope{y > 0.f ? y : 0.01f * y, y > 0.f ? 1.f : 0.01f}; });
        case Activation::mish: return body([](float y) { return mish(y); });
        case Activation::relu2:
            return body([](float y) { return ValueAndSlope{y < 0.f ? 0.f : y * y, y < 0.f ? 0.f : 2.f * y}; });
        case Activation::quick_gelu: return body([](float y) { return swish(y, 1.702f); });
        // identity; with its own case and no default, a kernel of the family would need a stack
        default: return body([](float y) { return ValueAndSlope{y, 1.f}; });
    }
}

COMPACTER_DEVICE ValueAndSlope activate(Activation activation, float y) {
    ValueAndSlope result;
    with_activation(activation, [&](auto function) { result = function(y); });
    return result;
}

}  // namespace compacter::cuda

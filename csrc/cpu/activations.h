// The activations, value and slope, one struct each; `with_activation` turns the enum into a type.
// They use no max(x, 0), so that NaN stays NaN. y is clamped if a large y would give 0 * infinity.
#pragma once

#include "../adapter.h"
#include "exp_erfc.h"

namespace compacter::COMPACTER_ISA {

struct ValueAndSlope {
    Vec value, slope;
};

// sigma(y) = 1 / (1 + e^-y), slope = e / (1 + e)^2, e = exp(-|y|); sigma (1 - sigma) would cancel
COMPACTER_INLINE Vec sigmoid(Vec y) { return 1.f / (1.f + exp(-y)); }

COMPACTER_INLINE ValueAndSlope sigmoid_with_slope(Vec y) {
    const Vec e = exp(-abs(y)), below = 1.f / (1.f + e);
    return {select(y < 0.f, e * below, below), e * below * below};
}

struct Identity {
    static COMPACTER_INLINE Vec value(Vec y) { return y; }
    static COMPACTER_INLINE ValueAndSlope both(Vec y) { return {y, splat(1.f)}; }
};

struct Relu {
    static COMPACTER_INLINE Vec value(Vec y) { return select(y < 0.f, Vec{}, y); }
    static COMPACTER_INLINE ValueAndSlope both(Vec y) { return {value(y), select(y <= 0.f, Vec{}, splat(1.f))}; }
};

struct Relu2 {
    static COMPACTER_INLINE Vec value(Vec y) { return Relu::value(y) * Relu::value(y); }
    static COMPACTER_INLINE ValueAndSlope both(Vec y) { return {value(y), 2.f * Relu::value(y)}; }
};

struct LeakyRelu {
    static COMPACTER_INLINE Vec value(Vec y) { return select(y > 0.f, y, 0.01f * y); }
    static COMPACTER_INLINE ValueAndSlope both(Vec y) { return {value(y), select(y > 0.f, splat(1.f), splat(0.01f))}; }
};

struct Sigmoid {
    static COMPACTER_INLINE Vec value(Vec y) { return sigmoid(y); }
    static COMPACTER_INLINE ValueAndSlope both(Vec y) { return sigmoid_with_slope(y); }
};

// tanh: a polynomial near 0, else (1 - e) / (1 + e) with e = exp(-2|y|); slope = 4 e / (1 + e)^2
struct Tanh {
    static COMPACTER_INLINE Vec value(Vec y) { return both(y).value; }
    static COMPACTER_INLINE ValueAndSlope both(Vec y) {
        const Vec e = exp(-2.f * abs(y)), below = 1.f / (1.f + e), y2 = y * y;
        Vec p = y2 * -5.70498872745e-3f + 2.06390887954e-2f;
        p = p * y2 - 5.37397155531e-2f;
        p = p * y2 + 1.33314422036e-1f;
        p = p * y2 - 3.33332819422e-1f;
        const Vec near = p * y2 * y + y, far = (1.f - e) * below;
        return {select(abs(y) < 0.625f, near, select(y < 0.f, -far, far)), 4.f * e * below * below};
    }
};

// y sigma(c y), slope = sigma + c y sigma'
template <class Scale>
struct Swish {
    static COMPACTER_INLINE Vec value(Vec y) { return y * sigmoid(y * Scale::c); }
    static COMPACTER_INLINE ValueAndSlope both(Vec y) {
        const ValueAndSlope s = sigmoid_with_slope(y * Scale::c);
        return {y * s.value, s.value + y * s.slope * Scale::c};
    }
};
struct One {
    static constexpr float c = 1.f;
};
struct QuickScale {
    static constexpr float c = 1.702f;
};

// 0.5 y (1 + tanh(a (y + b y^3))) = y sigma(2 a (y + b y^3)), a = sqrt(2 / pi), b = 0.044715
struct GeluNew {
    static constexpr float a2 = 2.f * 0.7978845608f, b = 0.044715f;
    static COMPACTER_INLINE Vec value(Vec y) {
        const Vec c = clamp(y, -30.f, 30.f);
        return y * sigmoid(c * (c * c * (a2 * b) + a2));
    }
    static COMPACTER_INLINE ValueAndSlope both(Vec y) {
        const Vec c = clamp(y, -30.f, 30.f), c2 = c * c;
        const ValueAndSlope s = sigmoid_with_slope(c * (c2 * (a2 * b) + a2));
        return {y * s.value, s.value + c * s.slope * (c2 * (3.f * a2 * b) + a2)};
    }
};

// y Phi(y), Phi(y) = erfc(-y / sqrt 2) / 2, slope = Phi(y) + y exp(-y^2 / 2) / sqrt(2 pi)
struct Gelu {
    static COMPACTER_INLINE Vec phi(Vec y) {
        const Vec tail = 0.5f * erfc_positive(abs(y) * 0.707106781f);
        return select(y > 0.f, 1.f - tail, tail);
    }
    static COMPACTER_INLINE Vec value(Vec y) { return y * phi(y); }
    static COMPACTER_INLINE ValueAndSlope both(Vec y) {
        const Vec p = phi(y), c = clamp(y, -30.f, 30.f);
        return {y * p, p + c * exp(-0.5f * c * c) * 0.398942280f};
    }
};

// y tanh(log(1 + e^y)) = y w / (w + 2) with e = e^y, w = e (e + 2);
// slope = w / (w + 2) + 4 y e (e + 1) / (w + 2)^2
struct Mish {
    static COMPACTER_INLINE Vec value(Vec y) {
        const Vec e = exp(clamp(y, -105.f, 20.f)), w = e * (e + 2.f);
        return y * (w / (w + 2.f));
    }
    static COMPACTER_INLINE ValueAndSlope both(Vec y) {
        const Vec e = exp(clamp(y, -105.f, 20.f)), w = e * (e + 2.f), below = 1.f / (w + 2.f), t = w * below;
        const Vec c = clamp(y, -105.f, 105.f);
        return {y * t, t + c * (4.f * e * (e + 1.f) * below) * below};
    }
};

template <class Body>
COMPACTER_INLINE void with_activation(Activation activation, const Body& body) {
    switch (activation) {
        case Activation::identity: return body(Identity{});
        case Activation::relu: return body(Relu{});
        case Activation::gelu: return body(Gelu{});
        case Activation::gelu_new: return body(GeluNew{});
        case Activation::silu: return body(Swish<One>{});
        case Activation::tanh: return body(Tanh{});
        case Activation::sigmoid: return body(Sigmoid{});
        case Activation::leaky_relu: return body(LeakyRelu{});
        case Activation::mish: return body(Mish{});
        case Activation::relu2: return body(Relu2{});
        case Activation::quick_gelu: return body(Swish<QuickScale>{});
    }
}

}  // namespace compacter::COMPACTER_ISA

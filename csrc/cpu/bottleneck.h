// The bottleneck of an adapter in the lane layout, from V of down to Z of up.
#pragma once

#include "activations.h"
#include "mix.h"

namespace compacter::COMPACTER_ISA {

// y[q,v] = sum_c V[q,c] t1_c[v] + b1[q,v]
inline void preactivation(const Factors& down, float* v, float* y) {
    const int64_t chunk = down.out_chunk();
    for (int64_t q = 0; q < down.n_out; ++q)
        lane_gemm({y + q * chunk * lanes, 1}, chunk, {v + q * down.m * lanes, 1}, down.m, {down.right, 1, chunk},
                  down.bias ? down.bias + q * chunk : nullptr);
}

// Z2[p,c] = sum_v h[p,v] s2_c[v]
inline void contract_bottleneck(const Factors& up, float* h, float* z2) {
    const int64_t chunk = up.in_chunk();
    for (int64_t p = 0; p < up.n_in; ++p)
        lane_gemm({z2 + p * up.m * lanes, 1}, up.m, {h + p * chunk * lanes, 1}, chunk, {up.left, chunk, 1});
}

// h = act(y), which overwrites y.
inline void activate(Activation activation, float* y, int64_t d) {
    with_activation(activation, [&](auto act) {
        for (int64_t j = 0; j < d * lanes; j += W) store(y + j, act.value(load(y + j)));
    });
}

// h = act(y), which overwrites y, and act'(y).
inline void activate_with_slope(Activation activation, float* y, float* slope, int64_t d) {
    with_activation(activation, [&](auto act) {
        for (int64_t j = 0; j < d * lanes; j += W) {
            const auto both = act.both(load(y + j));
            store(y + j, both.value);
            store(slope + j, both.slope);
        }
    });
}

// ds2_c[v] = sum_{token,p} h[p,v] dZ2[p,c]
inline void left_gradient(const Factors& up, const float* h, const float* dz2, float* sum) {
    const int64_t chunk = up.in_chunk();
    lane_outer(sum, chunk, dz2, h, 1, 1, {up.n_in, up.m, up.m, chunk, chunk});
}

// dy[p,v] = act'(y)[p,v] sum_c s2_c[v] dZ2[p,c], which overwrites act'(y); `dh` is scratch.
inline void preactivation_gradient(const Factors& up, float* dz2, float* dh, float* slope) {
    const int64_t chunk = up.in_chunk();
    for (int64_t p = 0; p < up.n_in; ++p)
        lane_gemm({dh + p * chunk * lanes, 1}, chunk, {dz2 + p * up.m * lanes, 1}, up.m, {up.left, 1, chunk});
    for (int64_t j = 0; j < up.in * lanes; j += W) store(slope + j, load(slope + j) * load(dh + j));
}

// dt1_c[v] = sum_{token,q} V[q,c] dy[q,v]
inline void right_gradient(const Factors& down, const float* v, const float* dy, float* sum) {
    const int64_t chunk = down.out_chunk();
    lane_outer(sum, chunk, v, dy, 1, 1, {down.n_out, down.m, down.m, chunk, chunk});
}

// db1 = sum_token dy
inline void bias_gradient(const float* dy, int64_t d, float* sum) {
    tiles<4, 1>(0, d, [&](auto size, int64_t j) COMPACTER_INLINE_LAMBDA {
        constexpr int C = decltype(size)::value;
        Vec total[4] = {};
        COMPACTER_UNROLL(4)
        for (int c = 0; c < C; ++c)
            COMPACTER_UNROLL(4)
            for (int l = 0; l < lanes; l += W) total[c] += load(dy + (j + c) * lanes + l);
        const Quad four = add_quarters(fold4(total[0], total[1], total[2], total[3]));
        if constexpr (C == 4)
            store4(sum + j, load4(sum + j) + four);
        else
            sum[j] += four[0];
    });
}

// dV[q,c] = sum_v dy[q,v] t1_c[v]
inline void expand_transposed(const Factors& down, float* dy, float* dv) {
    const int64_t chunk = down.out_chunk();
    for (int64_t q = 0; q < down.n_out; ++q)
        lane_gemm({dv + q * down.m * lanes, 1}, down.m, {dy + q * chunk * lanes, 1}, chunk, {down.right, chunk, 1});
}

}  // namespace compacter::COMPACTER_ISA

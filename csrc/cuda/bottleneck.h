// The middle of an adapter in both directions, from one wide factor to the other, on CUDA cores.
//
//   y[q,v]   = sum_i V[q,i] t1_i[v] + b1[q,v]         h = act(y)
//   Z2[p,i]  = sum_v h[p,v] s2_i[v]                   V2[q,i] = sum_p A2_i[p,q] Z2[p,i]
// and back
//   dZ2[p,i] = sum_q A2_i[p,q] dV2[q,i]               dA2_i[p,q] = sum_tok Z2[p,i] dV2[q,i]
//   dh[p,v]  = sum_i s2_i[v] dZ2[p,i]                 ds2_i[v] = sum_{tok,p} h[p,v] dZ2[p,i]
//   dy       = dh act'(y)                             db1 = sum_tok dy
//   dV[q,i]  = sum_v dy[q,v] t1_i[v]                  dt1_i[v] = sum_{tok,q} V[q,i] dy[q,v]
//   dZ[p,i]  = sum_q A1_i[p,q] dV[q,i]                dA1_i[p,q] = sum_tok Z[p,i] dV[q,i]
#pragma once

#include "activations.h"
#include "kernels.h"
#include "middle.h"
#include "stage.h"

namespace compacter::cuda {

// From V of `down`, in v, to V2, which it passes to store(token, block of q, c, quad). It overwrites z with Z2.
template <class K, class Team, class Store>
COMPACTER_DEVICE void through_bottleneck(const Team& team, const Sizes& s, const SharedFactors& shared, Activation activation,
                                         float* z, const float* v, float* h, const Store& store) {
    constexpr int Q = K::quad;
    const int n = K::n(s), m = K::m(s);
    const float *right = floats_at(shared.right), *left2 = floats_at(shared.left2), *bias = floats_at(shared.bias);
    for_each_quad<K>(team, s, s.inner, s.by_inner, [&](int token, int block, int at) {
        Quad<Q> y = load_quad<Q>(bias + at * n + block * Q);
        add_product<K>(y, right + at, s.inner_stride, v + token * m * n + block * Q, m, n);
#pragma unroll
        for (int j = 0; j < Q; ++j) y.at[j] = activate(activation, y.at[j]).value;
        store_quad<Q>(h + (token * s.inner + at) * n + block * Q, y);
    });
    team.sync();
    for_each_quad<K>(team, s, m, s.by_m, [&](int token, int block, int c) {
        Quad<Q> sum{};
        add_product<K>(sum, left2 + c * s.inner_stride, 1, h + token * s.inner * n + block * Q, s.inner, n);
        store_quad<Q>(z + (token * m + c) * n + block * Q, sum);
    });
    team.sync();
    mix<K>(team, s, floats_at(shared.rule2), z, store);
}

// A tile of a backward between the projections, for a block. One projection has V2 = V and dV2 = dV.
template <class K>
struct Between {
    static constexpr int Q = K::quad;
    const Sizes& s;
    SharedFactors shared;
    SharedSums sums;
    Numbers at;
    Activation activation;
    bool sum = true;  // whether the gradients of the parameters are wanted
    Block block{};

    // From Z and dV2 to V2 and dZ, which it passes to stores as `mix` does, with the sums of the gradients.
    template <class ToV, class ToDz>
    COMPACTER_DEVICE void back(const ToV& to_v, const ToDz& to_dz) const {
        const float *rule = floats_at(shared.rule), *rule2 = floats_at(shared.rule2);
        const float *z = floats_at(at.z), *dv2 = floats_at(at.dv2), *z2 = floats_at(at.z2), *dv = floats_at(at.dv);
        if (!s.inner) {
            mix<K>(block, s, rule, z, to_v);
            mix_back<K>(block, s, rule, dv2, to_dz);
            if (sum) add_rule_gradient<K>(block, s, floats_at(sums.rule), z, dv2);
            return block.sync();
        }
        const auto to = [&](float* array) {
            return [this, array](int token, int blk, int c, const Quad<Q>& quad) {
                store_quad<Q>(array + (token * K::m(s) + c) * K::n(s) + blk * Q, quad);
            };
        };
        mix<K>(block, s, rule, z, to(floats_at(at.v)));
        mix_back<K>(block, s, rule2, dv2, to(floats_at(at.dz2)));
        block.sync();
        widen();
        block.sync();
        reduce();
        block.sync();
        mix<K>(block, s, rule2, z2, to_v);
        mix_back<K>(block, s, rule, dv, to_dz);
        if (sum) {
            add_rule_gradient<K>(block, s, floats_at(sums.rule), z, dv);
            add_rule_gradient<K>(block.shifted(block.size / 2), s, floats_at(sums.rule2), z2, dv2);
        }
        block.sync();
    }

  private:
    // Computes h and dy.
    COMPACTER_DEVICE void widen() const {
        const int n = K::n(s), m = K::m(s);
        const float *right = floats_at(shared.right), *left2 = floats_at(shared.left2), *bias = floats_at(shared.bias);
        const float *v = floats_at(at.v), *dz2 = floats_at(at.dz2);
        for_each_quad<K>(block, s, s.inner, s.by_inner, [&](int token, int blk, int v_at) {
            const int numbers = token * m * n + blk * Q, to = (token * s.inner + v_at) * n + blk * Q;
            Quad<Q> y = load_quad<Q>(bias + v_at * n + blk * Q), dh{};
            add_product<K>(y, right + v_at, s.inner_stride, v + numbers, m, n);
            add_product<K>(dh, left2 + v_at, s.inner_stride, dz2 + numbers, m, n);
#pragma unroll
            for (int j = 0; j < Q; ++j) {
                const ValueAndSlope a = activate(activation, y.at[j]);
                y.at[j] = a.value;
                dh.at[j] *= a.slope;
            }
            store_quad<Q>(floats_at(at.h) + to, y);
            store_quad<Q>(floats_at(at.dy) + to, dh);
        });
    }

    // Computes Z2 and dV, and adds to the gradients of t1, s2 and b1.
    COMPACTER_DEVICE void reduce() const {
        const int n = K::n(s), m = K::m(s);
        const float *right = floats_at(shared.right), *left2 = floats_at(shared.left2);
        const float *v = floats_at(at.v), *dz2 = floats_at(at.dz2), *h = floats_at(at.h), *dy = floats_at(at.dy);
        for_each_quad<K>(block, s, m, s.by_m, [&](int token, int blk, int c) {
            const int from = token * s.inner * n + blk * Q, to = (token * m + c) * n + blk * Q;
            Quad<Q> of_h{}, of_dy{};
            add_product<K>(of_h, left2 + c * s.inner_stride, 1, h + from, s.inner, n);
            add_product<K>(of_dy, right + c * s.inner_stride, 1, dy + from, s.inner, n);
            store_quad<Q>(floats_at(at.z2) + to, of_h);
            store_quad<Q>(floats_at(at.dv) + to, of_dy);
        });
        if (!sum) return;
        add_outer<K>(block.shifted(block.size / 4), s, floats_at(sums.right), s.inner, v, m, dy, s.inner, s.by_inner);
        add_outer<K>(block.shifted(block.size / 2), s, floats_at(sums.left2), s.inner, dz2, m, h, s.inner, s.by_inner);
        float* bias = floats_at(sums.bias);
        for (int e = block.shifted(block.size / 4 * 3).rank; e < s.inner * n; e += block.size)
            for (int token = 0; token < s.tokens; ++token) bias[e] += dy[token * s.inner * n + e];
    }
};

}  // namespace compacter::cuda

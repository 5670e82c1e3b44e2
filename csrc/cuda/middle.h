// Between the projections: fp32 numbers X[token][c][p] of a tile in shared memory, for a warp or a
// block. Q = 4 numbers p are computed at once, or 1 if 4 does not divide n.
#pragma once

#include "sizes.h"
#include "ptx.h"

namespace compacter::cuda {

struct Warp {
    int rank = threadIdx.x % 32, size = 32;
    COMPACTER_DEVICE void sync() const { __syncwarp(); }
};
struct Block {
    int rank = threadIdx.x, size = blockDim.x;
    COMPACTER_DEVICE void sync() const { __syncthreads(); }

    // The same team from thread `by` < size on, so that small jobs in a row use different threads.
    COMPACTER_DEVICE Block shifted(int by) const {
        Block team = *this;
        team.rank = rank >= by ? rank - by : rank - by + size;
        return team;
    }
};

template <int Q>
struct Quad {
    float at[Q];
};

template <int Q>
COMPACTER_DEVICE Quad<Q> load_quad(const float* p) {
    if constexpr (Q == 4) {
        const float4 v = *reinterpret_cast<const float4*>(p);
        return {{v.x, v.y, v.z, v.w}};
    } else {
        return {{*p}};
    }
}

template <int Q>
COMPACTER_DEVICE void store_quad(float* p, const Quad<Q>& v) {
    if constexpr (Q == 4)
        *reinterpret_cast<float4*>(p) = make_float4(v.at[0], v.at[1], v.at[2], v.at[3]);
    else
        *p = v.at[0];
}

template <int Q>
COMPACTER_DEVICE void add_scaled(Quad<Q>& sum, float factor, const Quad<Q>& v) {
#pragma unroll
    for (int j = 0; j < Q; ++j) sum.at[j] = fmaf(factor, v.at[j], sum.at[j]);
}

template <int Q>
COMPACTER_DEVICE float add_dot(float sum, const Quad<Q>& a, const Quad<Q>& b) {
#pragma unroll
    for (int j = 0; j < Q; ++j) sum = fmaf(a.at[j], b.at[j], sum);
    return sum;
}

// body(token, block, c) for all c of all quads, c fastest.
template <class K, class Team, class Body>
COMPACTER_DEVICE void for_each_quad(const Team& team, const Sizes& s, int count, const Divisor& by_count, const Body& body) {
    for (int e = team.rank; e < s.tokens * K::blocks(s) * count; e += team.size) {
        const int rest = by_count.quotient(e), token = K::by_blocks(s, rest);
        body(token, rest - token * K::blocks(s), e - rest * count);
    }
}

// V[q, i] = sum_p A_i[p, q] Z[p, i], for which it calls store(token, block of q, c, quad).
template <class K, class Team, class Store>
COMPACTER_DEVICE void mix(const Team& team, const Sizes& s, const float* rule, const float* z, const Store& store) {
    constexpr int Q = K::quad;
    const int n = K::n(s), m = K::m(s);
    for_each_quad<K>(team, s, m, s.by_m, [&](int token, int block, int c) {
        const float *row = rule + c / K::rank(s) * s.rule_stride + block * Q, *from = z + (token * m + c) * n;
        Quad<Q> sum{};
#pragma unroll 4
        for (int p = 0; p < n; p += Q) {
            const Quad<Q> four = load_quad<Q>(from + p);
#pragma unroll
            for (int j = 0; j < Q; ++j) add_scaled(sum, four.at[j], load_quad<Q>(row + (p + j) * n));
        }
        store(token, block, c, sum);
    });
}

// dZ[p, i] = sum_q A_i[p, q] dV[q, i], for which it calls store(token, block of p, c, quad).
template <class K, class Team, class Store>
COMPACTER_DEVICE void mix_back(const Team& team, const Sizes& s, const float* rule, const float* dv, const Store& store) {
    constexpr int Q = K::quad;
    const int n = K::n(s), m = K::m(s);
    for_each_quad<K>(team, s, m, s.by_m, [&](int token, int block, int c) {
        const float *rows = rule + c / K::rank(s) * s.rule_stride + block * Q * n, *from = dv + (token * m + c) * n;
        Quad<Q> sum{};
#pragma unroll(K::most_columns > 1 ? 1 : 2)
        for (int q = 0; q < n; q += Q) {
            const Quad<Q> four = load_quad<Q>(from + q);
#pragma unroll
            for (int j = 0; j < Q; ++j) sum.at[j] = add_dot(sum.at[j], four, load_quad<Q>(rows + j * n + q));
        }
        store(token, block, c, sum);
    });
}

// Adds sum_b factor[b * stride] X[b][p] for one quad of p, where X is [count][n] from the quad on.
template <class K>
COMPACTER_DEVICE void add_product(Quad<K::quad>& sum, const float* factor, int stride, const float* x, int count, int n) {
#pragma unroll 4
    for (int b = 0; b < count; ++b) add_scaled(sum, factor[b * stride], load_quad<K::quad>(x + b * n));
}

// G[a * stride + b] += sum over tokens and p of L[token][a][p] R[token][b][p]
template <class K>
COMPACTER_DEVICE void add_outer(const Block& team, const Sizes& s, float* gradient, int stride, const float* left, int lefts,
                                const float* right, int rights, const Divisor& by_rights) {
    constexpr int Q = K::quad;
    const int n = K::n(s);
    for (int e = team.rank; e < lefts * rights; e += team.size) {
        const int a = by_rights.quotient(e), b = e - a * rights;
        float sum = 0.f;
        for (int token = 0; token < s.tokens; ++token)
            for (int p = 0; p < n; p += Q)
                sum = add_dot(sum, load_quad<Q>(left + (token * lefts + a) * n + p),
                              load_quad<Q>(right + (token * rights + b) * n + p));
        gradient[a * stride + b] += sum;
    }
}

// dA_i[p, q] += sum over tokens and rho of Z[p, i] dV[q, i], Q x Q numbers at once, laid out as A
template <class K>
COMPACTER_DEVICE void add_rule_gradient(const Block& team, const Sizes& s, float* gradient, const float* z, const float* dv) {
    constexpr int Q = K::quad;
    const int n = K::n(s), m = K::m(s), rank = K::rank(s), blocks = K::blocks(s);
    for (int e = team.rank; e < K::terms(s) * blocks * blocks; e += team.size) {
        const int rest = K::by_blocks(s, e), q = (e - rest * blocks) * Q, i = K::by_blocks(s, rest), p = (rest - i * blocks) * Q;
        Quad<Q> sum[Q] = {};
        for (int token = 0; token < s.tokens; ++token)
            for (int rho = 0; rho < rank; ++rho) {
                const int at = (token * m + i * rank + rho) * n;
                const Quad<Q> left = load_quad<Q>(z + at + p), right = load_quad<Q>(dv + at + q);
#pragma unroll
                for (int j = 0; j < Q; ++j) add_scaled(sum[j], left.at[j], right);
            }
#pragma unroll
        for (int j = 0; j < Q; ++j) {
            float* to = gradient + i * s.rule_stride + (p + j) * n + q;
            Quad<Q> total = load_quad<Q>(to);
            add_scaled(total, 1.f, sum[j]);
            store_quad<Q>(to, total);
        }
    }
}

}  // namespace compacter::cuda

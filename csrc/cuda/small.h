// The small factors of the adapters of a tile in shared memory, and the sums of their gradients, for a block.
#pragma once

#include "slabs.h"

namespace compacter::cuda {

COMPACTER_DEVICE SharedFactors of_slot(SharedFactors at, int bytes) {
    for (int* offset : {&at.rule, &at.rule2, &at.right, &at.left2, &at.bias}) *offset += bytes;
    return at;
}
COMPACTER_DEVICE SharedSums of_slot(SharedSums at, int bytes) {
    for (int* offset : {&at.rule, &at.rule2, &at.right, &at.left2, &at.bias}) *offset += bytes;
    return at;
}

COMPACTER_DEVICE void clear(int from, int to) {
    for (int e = from / 16 + threadIdx.x; e < to / 16; e += blockDim.x) vectors_at(0)[e] = make_uint4(0, 0, 0, 0);
}

// The places of the numbers of the small factors of one adapter in its slot, in floats, in the order of their tensors.
struct SmallPlaces {
    const Family& f;

    COMPACTER_DEVICE int rule(int e) const {
        const int matrix = f.n_in * f.n_out, i = e / matrix, p = (e - i * matrix) / f.n_out;
        return i * f.middle.rule_stride + p * f.middle.n + e - i * matrix - p * f.n_out;
    }
    // stride: from one c to the next, inner_stride for the factors and inner for the sums.
    COMPACTER_DEVICE int right(int e, int stride) const {
        const int c = f.middle.by_inner.quotient(e);
        return c * stride + e - c * f.middle.inner;
    }
    COMPACTER_DEVICE int left2(int e, int stride) const {  // [i][v][rho]
        const int rank = f.middle.rank, row = e / rank, i = f.middle.by_inner.quotient(row);
        return (i * rank + e - row * rank) * stride + row - i * f.middle.inner;
    }
    COMPACTER_DEVICE int bias(int e) const {
        if (f.dense) return e;
        const int q = f.middle.by_inner.quotient(e);
        return (e - q * f.middle.inner) * f.middle.n + q;
    }
};

// A rule and the small factor beside it, of which family_folded.h makes C[(c,a),(b,v)] = A_i[a,b] f_c[v], c = (i, rho). (a, b) is
// (p, q) of the first projection, and (q, p) of the second.
struct FoldedSide {
    const Family& f;
    bool second;
    int n = f.n_in, inner = f.middle.inner;

    COMPACTER_DEVICE float rule(int64_t adapter, int i, int a, int b) const {
        const bool shared = second ? f.shared_rule2 : f.shared_rule;
        const int at = (i * n + (second ? b : a)) * n + (second ? a : b);
        return read(second ? f.rule2 : f.rule, (shared ? 0 : adapter * f.rule_size()) + at);
    }
    COMPACTER_DEVICE float factor(int64_t adapter, int c, int v) const {
        const int i = f.by_rank.quotient(c), rank = f.middle.rank;
        const int at = second ? (i * inner + v) * rank + c - i * rank : c * inner + v;
        return read(second ? f.left2 : f.right, adapter * f.inner_size() + at);
    }

    // The gradient of number e of the rule, and of number e of the factor, from the sums dC of a slot.
    COMPACTER_DEVICE float rule_gradient(const float* sums, int64_t adapter, int e) const {
        const int i = e / (n * n), p = (e - i * n * n) / n, q = e - (i * n + p) * n, rank = f.middle.rank;
        float sum = 0.f;
        for (int c = i * rank; c < (i + 1) * rank; ++c) {
            const float* row = sums + (c * n + (second ? q : p)) * f.folded.stride + (second ? p : q) * inner;
            for (int v = 0; v < inner; ++v) sum = fmaf(row[v], factor(adapter, c, v), sum);
        }
        return sum;
    }
    COMPACTER_DEVICE float factor_gradient(const float* sums, int64_t adapter, int e) const {
        const int rank = f.middle.rank, row = second ? e / rank : e, i_or_c = f.middle.by_inner.quotient(row);
        const int c = second ? i_or_c * rank + e - row * rank : i_or_c, v = row - i_or_c * inner, i = f.by_rank.quotient(c);
        float sum = 0.f;
        for (int a = 0; a < n; ++a)
            for (int b = 0; b < n; ++b)
                sum = fmaf(sums[(c * n + a) * f.folded.stride + b * inner + v], rule(adapter, i, a, b), sum);
        return sum;
    }
};

// The image of a tile's adapter.
COMPACTER_DEVICE const unsigned char* image_of(const Family& f, const Images& images, int adapter) {
    return images.first + (f.mixed ? 0 : adapter) * images.bytes;
}

// Copies the small factors of all slots, and the wide ones if they fit whole.
COMPACTER_DEVICE void stage_image(const Family& f, const FamilyPlaces& places, int adapter) {
    const Images& images = places.images;
    const unsigned char* image = image_of(f, images, adapter);
    copy_bytes(places.small, image, images.small);
    if (places.left.whole) {
        copy_bytes(places.left.at, image + images.left, images.left_slab);
        copy_bytes(places.right2.at, image + images.right2, images.right2_slab);
    }
    commit_copies();
    wait_copies<0>();
}

// Writes the sums of all slots to the rows of a program, each in the order of its tensor.
COMPACTER_DEVICE void store_small(const Family& f, const SharedSums& sums, int bytes, const Partials& partials, int adapter) {
    const SmallPlaces place{f};
    for (int slot = 0; slot < f.slots; ++slot) {
        const SharedSums from = of_slot(sums, slot * bytes);
        float* to = partials.of(f, blockIdx.x, f.mixed ? slot : adapter);
        const int size = f.rule_size(), inner = f.inner_size(), bias = f.bias_size();
        if (!f.dense)
            for (int j = threadIdx.x; j < size; j += blockDim.x) {
                to[j] = floats_at(from.rule)[place.rule(j)];
                if (f.middle.inner) to[size + inner + bias + j] = floats_at(from.rule2)[place.rule(j)];
            }
        for (int j = threadIdx.x; j < bias; j += blockDim.x) to[size + inner + j] = floats_at(from.bias)[place.bias(j)];
        for (int j = threadIdx.x; j < inner; j += blockDim.x) {
            to[size + j] = floats_at(from.right)[place.right(j, f.middle.inner)];
            to[size + inner + bias + size + j] = floats_at(from.left2)[place.left2(j, f.middle.inner)];
        }
    }
}

// The same of the gradients that follow from the sums of folded matrices.
COMPACTER_DEVICE void store_folded(const Family& f, const FoldedPlaces& sums, int bytes, const Partials& partials, int adapter) {
    const int size = f.rule_size(), inner = f.inner_size(), bias = f.bias_size();
    const auto for_each = [&](int count, const auto& body) {
        for (int e = threadIdx.x; e < f.slots * count; e += blockDim.x) {
            const int slot = e / count, its = f.mixed ? slot : adapter;
            body(slot * bytes, its, partials.of(f, blockIdx.x, its), e - slot * count);
        }
    };
#pragma unroll 1
    for (int second = 0; second < 2; ++second) {
        const FoldedSide side{f, second != 0};
        const int begin = second ? size + inner + bias : 0, from = second ? sums.second : sums.first;
        for_each(size, [&](int slot, int its, float* to, int e) {
            to[begin + e] = side.rule_gradient(floats_at(from + slot), its, e);
        });
        for_each(inner, [&](int slot, int its, float* to, int e) {
            to[begin + size + e] = side.factor_gradient(floats_at(from + slot), its, e);
        });
    }
    for_each(bias, [&](int slot, int, float* to, int e) { to[size + inner + e] = floats_at(sums.bias + slot)[e]; });
}

// The ones that pick the row of the bias, times the weight of a slot, [slot][token], in rows c = `first` on: those of slot and q
// have them in the rows q of the tokens. All other numbers of these c are 0 already.
template <class T, class Weight>
COMPACTER_DEVICE void store_ones(const Parts& to, int first, const Family& f, const Weight& weight) {
    const int tokens = f.middle.tokens;
    for (int e = threadIdx.x; e < tokens * f.slots; e += blockDim.x) {
        const int slot = e / tokens, token = e - slot * tokens;
        const float number = weight(slot, token);
        for (int q = 0; q < f.n_out; ++q) store_parts<T>(to, first + slot * f.n_out + q, token * f.n_out + q, number);
    }
}

}  // namespace compacter::cuda

// The images of the adapters: their parameters as the kernels of the family need them in shared memory. An adapter that does
// not occur has none. `scale` multiplies t2 and b2, whose rows follow those of t2.
#include "small.h"

namespace compacter::cuda {
namespace {

// The wide factors of an image: `columns` numbers c of each u, then rows of the bias.
struct Wide {
    const Family& f;
    const Factor& factor;
    int terms, adapter;
    float scale;

    // The number c, u, which exists.
    COMPACTER_DEVICE Asked ask(int c, int u) const {
        if (c >= f.columns) {
            const int row = c - f.columns, slot = f.by_n_out.quotient(row);
            return Asked(f.bias2.array, f.bias2.at(f.mixed ? slot : adapter, row - slot * f.n_out, 0, u));
        }
        const int slot = f.middle.by_m.quotient(c), of_slot = c - slot * f.middle.m, rank = f.middle.rank, i = of_slot / rank;
        return Asked(factor.array, factor.at(f.mixed ? slot : adapter, i, of_slot - i * rank, u));
    }

    // Pairs of columns `begin` to `end` of all slabs, those of neighbours in memory one after another.
    COMPACTER_DEVICE void make(unsigned char* to, const Slab& slab, int slab_bytes, int width, int begin, int end) const {
        constexpr int ahead = 4;
        const int pairs = slabs(slab, width) * slab.segments * segment / 2;
        const int stride = factor_stride(slab.segments * segment), part = slab.rows * stride;
        for (int first = begin + threadIdx.x; first < end; first += ahead * blockDim.x) {
            Asked asked[ahead][2];
            int at_c[ahead], at_u[ahead];
#pragma unroll
            for (int j = 0; j < ahead; ++j) {
                const int wanted = first + j * static_cast<int>(blockDim.x), e = wanted < end ? wanted : end - 1;
                const int major = factor.columns_first() ? e / slab.rows : e / pairs;
                at_c[j] = factor.columns_first() ? e - major * slab.rows : major;
                at_u[j] = (factor.columns_first() ? major : e - major * pairs) * 2;
#pragma unroll
                for (int k = 0; k < 2; ++k)
                    asked[j][k] = ask(min(at_c[j], terms - 1), at_u[j] + k < width ? at_u[j] + k : width - 1);
            }
#pragma unroll
            for (int j = 0; j < ahead; ++j) {
                const int u = at_u[j], number = u / (slab.segments * segment);
                if (first + j * static_cast<int>(blockDim.x) >= end) break;
                uint32_t pair[3];
                const bool real = at_c[j] < terms;
                split(real && u < width ? asked[j][0].value() * scale : 0.f,
                      real && u + 1 < width ? asked[j][1].value() * scale : 0.f, pair);
                auto* numbers = reinterpret_cast<uint16_t*>(to + int64_t{number} * slab_bytes) + at_c[j] * stride +
                                place_of(u - number * slab.segments * segment);
#pragma unroll
                for (int of = 0; of < 3; ++of)
                    if (of < slab.parts) *reinterpret_cast<uint32_t*>(numbers + of * part) = pair[of];
            }
        }
    }

    COMPACTER_DEVICE static int slabs(const Slab& slab, int width) { return (segments(width) + slab.segments - 1) / slab.segments; }
    COMPACTER_DEVICE static int numbers(const Slab& slab, int width) {
        return slab.rows * slabs(slab, width) * slab.segments * segment / 2;
    }
};

// The share of a piece in the folded matrices of all slots, with zeros around them, and the bias of the bottleneck.
COMPACTER_DEVICE void make_folded(unsigned char* to, const FamilyImages& k, int adapter, int piece) {
    const Family& f = k.family;
    const FoldedPlaces& places = k.places.folded;
    const Folded& folded = f.folded;
    const int begin = piece * blockDim.x + threadIdx.x, step = k.pieces * blockDim.x;
    const int part = folded.padded_rows * folded.stride, inner = f.middle.inner;
    const auto in_slot = [&](int slot, int place) { return to + place + slot * k.places.factors_bytes - k.places.small; };
#pragma unroll 2
    for (int e = begin; e < f.slots * 2 * part; e += step) {
        const int matrix = e / part, of_matrix = e - matrix * part, slot = matrix / 2;
        const bool second = matrix % 2;
        const int row = of_matrix / folded.stride, column = of_matrix - row * folded.stride;
        const bool real = row < folded.rows && column < folded.width;
        const int its = f.mixed ? slot : adapter, c = real ? folded.by_n.quotient(row) : 0, a = real ? row - c * f.n_in : 0;
        const int b = real ? f.middle.by_inner.quotient(column) : 0, v = real ? column - b * inner : 0;
        const FoldedSide side{f, second};
        const float product = side.rule(its, f.by_rank.quotient(c), a, b) * side.factor(its, c, v);
        uint32_t pair[3];
        split(real ? product : 0.f, 0.f, pair);
        auto* numbers = reinterpret_cast<uint16_t*>(in_slot(slot, second ? places.second : places.first)) + of_matrix;
#pragma unroll
        for (int of = 0; of < 3; ++of)
            if (of < folded.parts) numbers[of * part] = static_cast<uint16_t>(pair[of]);
    }
    for (int e = begin; e < f.slots * folded.padded_width; e += step) {
        const int slot = e / folded.padded_width, column = e - slot * folded.padded_width;
        const bool real = f.bias.data && column < folded.width;
        reinterpret_cast<float*>(in_slot(slot, places.bias))[column] =
            real ? read(f.bias, int64_t{f.mixed ? slot : adapter} * folded.width + column) : 0.f;
    }
}

// The small factors of all slots, with zeros between them.
COMPACTER_DEVICE void make_small(unsigned char* to, const FamilyImages& k, int adapter) {
    const Family& f = k.family;
    const SmallPlaces place{f};
    auto* floats = reinterpret_cast<float*>(to);
    for (int e = threadIdx.x; e < k.places.images.small / 4; e += blockDim.x) floats[e] = 0.f;
    __syncthreads();
    for (int slot = 0; slot < f.slots; ++slot) {
        const SharedFactors at = of_slot(k.places.factors, slot * k.places.factors_bytes - k.places.small);
        const int64_t e = f.mixed ? slot : adapter;
        const int size = f.rule_size(), inner = f.inner_size();
        if (f.bias.data)
            for (int j = threadIdx.x; j < f.bias_size(); j += blockDim.x)
                floats[at.bias / 4 + place.bias(j)] = read(f.bias, e * f.bias_size() + j);
        if (f.dense) continue;
        for (int j = threadIdx.x; j < size; j += blockDim.x) {
            floats[at.rule / 4 + place.rule(j)] = read(f.rule, (f.shared_rule ? 0 : e * size) + j);
            if (f.middle.inner) floats[at.rule2 / 4 + place.rule(j)] = read(f.rule2, (f.shared_rule2 ? 0 : e * size) + j);
        }
        for (int j = threadIdx.x; j < inner; j += blockDim.x) {
            floats[at.right / 4 + place.right(j, f.middle.inner_stride)] = read(f.right, e * inner + j);
            floats[at.left2 / 4 + place.left2(j, f.middle.inner_stride)] = read(f.left2, e * inner + j);
        }
    }
}

__global__ void __launch_bounds__(256, 2) make_images(const FamilyImages k) {
    const Family& f = k.family;
    const Tiling& t = f.tiling;
    const int adapter = blockIdx.x / k.pieces, piece = blockIdx.x - adapter * k.pieces;
    if (t.table && t.table[t.starts() + adapter] == t.table[t.starts() + adapter + 1]) return;
    unsigned char* to = k.to + adapter * k.places.images.bytes;
    if (f.folded.rows) make_folded(to, k, adapter, piece);
    else if (piece == 0) make_small(to, k, adapter);
    const Slab &left = k.places.left, &right2 = k.places.right2;
    const int of_left = Wide::numbers(left, f.middle.in), all = of_left + Wide::numbers(right2, f.middle.out);
    const int share = (all + k.pieces - 1) / k.pieces, begin = piece * share, end = begin + share < all ? begin + share : all;
    const Images& images = k.places.images;
    if (begin < of_left)
        Wide{f, f.left, left.terms, adapter, 1.f}.make(to + images.left, left, images.left_slab, f.middle.in, begin, min(end, of_left));
    if (end > of_left)
        Wide{f, f.right2, right2.terms, adapter, f.scale}.make(to + images.right2, right2, images.right2_slab, f.middle.out,
                                                               max(begin - of_left, 0), end - of_left);
}

}  // namespace

void family_images_kernel(const FamilyImages& k, const Launch& l) { launch(make_images, l, k); }

}  // namespace compacter::cuda

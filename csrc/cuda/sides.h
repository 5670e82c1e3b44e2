// The shape that backward_sides.cu is compiled for, its layout of shared memory, and a warp's part of the tiles: x or
// g of one pair of chunks.
#pragma once

#include "kernels.h"
#include "ring.h"

namespace compacter::cuda {

// An adapter of width Wide and bottleneck width Narrow.
template <int Dim, int Wide, int Narrow>
struct Sides {
    static constexpr int n = Dim, width = Wide, chunk = Wide / Dim, d = Narrow, inner = Narrow / Dim;
    static constexpr int tokens = 16, pairs = n / 2, warps = 2 * pairs, threads = warps * 32;
    static constexpr int eights = d / 8, steps = d / 16;              // of the bottleneck
    static constexpr int blocks = chunk / 16, segments = chunk / 32;  // columns of a chunk, in 16s and 32s
    static_assert(n == 12 && chunk % 32 == 0 && d % 16 == 0 && eights == pairs);

    // Rows in shared memory are odd multiples of 16 bytes, so that ldmatrix meets eight different banks.
    static constexpr int row = (width / 8 | 1) * 16, factor_row = (chunk / 8 | 1) * 16, middle_row = (d / 8 | 1) * 16;
    static constexpr int tile = 2 * tokens * row;  // rows of x, then rows of g

    // The parameters, as matrices.h stages them, and s1 in the order of the columns of dx. C1 and C2 are in registers.
    static constexpr int left = 0, right2 = left + 2 * n * factor_row;  // [part][i][u]
    static constexpr int expanding = right2 + 2 * n * factor_row;
    static constexpr int rule_pad = 4, matrix = n * n + rule_pad;
    static constexpr int rule = expanding + n * factor_row, rule2 = rule + n * matrix * 4;
    static constexpr int narrow = rule2 + n * matrix * 4, narrow2 = narrow + d * 4, bias = narrow2 + d * 4;

    static constexpr int rest = bias + d * 4;  // what rounding took from C1; then dy and h
    static constexpr int middle = rest + n * n * d * 2, middle_bytes = tokens * middle_row;  // [side][part][token]
    static constexpr int parts = middle + 4 * middle_bytes;  // of y and dh: [warp][eight][half][lane][2]
    static constexpr int ring = parts + warps * eights * 512, stages = 3, bytes = ring + stages * tile;
};

// Calls body(Sides{}) with the compiled shape of these sizes and returns true, or returns false.
template <class Body>
bool with_sides(const Sizes& s, const Body& body) {
    using S = Sides<12, 768, 48>;
    return are_of<S>(s) && (body(S{}), true);
}

// Row r of a matrix of eight tokens is this token. Rows 2m and 2m + 1 are then 64 bytes apart in the banks. So eight
// lanes that read 64 bytes of both meet different banks.
COMPACTER_DEVICE int token_of_row(int r) { return r / 2 + r % 2 * 4; }

template <class S>
struct SidePart {
    const Backward& b;
    const int warp = warp_index(), side = warp / S::pairs, pair = warp % S::pairs;  // side 0 has x, side 1 has g

    COMPACTER_DEVICE explicit SidePart(const Backward& b) : b(b) {}

    // The first byte of the warp's part of a token.
    COMPACTER_DEVICE int first() const { return pair * 4 * S::chunk; }
    // Where a lane points for ldmatrix in a tile: a left operand whose rows are tokens, or 16 columns.
    COMPACTER_DEVICE int rows_at(int lane) const {
        return (token_of_row(lane % 8) + lane / 8 % 2 * 8) * S::row + lane / 16 * 16 + first();
    }
    COMPACTER_DEVICE int columns_at(int lane) const {
        return (token_of_row(lane % 8) + lane / 16 * 8) * S::row + lane / 8 % 2 * 16 + first();
    }

    // The rows of one side of a tile.
    COMPACTER_DEVICE static unsigned char* rows(int stage, int side) {
        return shared_memory() + S::ring + stage * S::tile + side * (S::tile / 2);
    }

    // Starts to copy the warp's part: 16 bytes a lane, zeros for the tokens that are missing.
    COMPACTER_DEVICE void load(int tile, int stage) const {
        const int64_t start = int64_t{tile} * S::tokens * S::width * 2;
        const auto* from = static_cast<const unsigned char*>(side ? b.grad_out : b.x) + start;
        constexpr int vectors = S::chunk / 4, at_once = 32 / vectors;
        static_assert(32 % vectors == 0);
        const int lane = lane_anew(), count = valid_tokens<S>(b, tile), token = lane / vectors, at = first() + lane % vectors * 16;
        unsigned char* to = rows(stage, side) + token * S::row + at;
        from += token * S::width * 2 + at;
        const auto copy = [&](auto all) {  // all: no token is missing
#pragma unroll
            for (int begin = 0; begin < S::tokens; begin += at_once) {
                const bool real = decltype(all)::value || token + begin < count;
                copy_async(to + begin * S::row, from + (real ? begin * S::width * 2 : -token * S::width * 2), real);
            }
        };
        if (count == S::tokens) copy(std::true_type{});
        else copy(std::false_type{});
    }
};

}  // namespace compacter::cuda

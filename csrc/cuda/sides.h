// The backward for n = 12 (backward_sides.cu): its layout of shared memory, and a warp's part of the tiles.
//
// A block has a tile of 16 tokens at a time, and two warps for each pair of chunks: one on the side of x, one on the
// side of g.
#pragma once

#include "kernels.h"
#include "pairs.h"

namespace compacter::cuda {

// An adapter of width Wide and bottleneck width Narrow.
template <int Dim, int Wide, int Narrow>
struct Sides {
    static constexpr int n = Dim, width = Wide, chunk = Wide / Dim, d = Narrow, inner = Narrow / Dim;
    static constexpr int tokens = 16, pairs = n / 2, warps = 2 * pairs, threads = warps * 32;
    static constexpr int eights = d / 8, steps = d / 16;               // of the bottleneck
    static constexpr int blocks = chunk / 16, segments = chunk / 32;  // columns of a chunk, in 16s and 32s
    static_assert(n == 12 && chunk % 32 == 0 && d % 16 == 0 && eights == pairs);

    // Rows in shared memory are odd multiples of 16 bytes, so that ldmatrix meets eight different banks.
    static constexpr int row = (width / 8 | 1) * 16, factor_row = (chunk / 8 | 1) * 16, middle_row = (d / 8 | 1) * 16;
    static constexpr int tile = 2 * tokens * row;           // rows of x, then rows of g
    static constexpr int middle_bytes = tokens * middle_row;

    // The parameters (matrices.h). C1 and C2 stay in registers. `expanding` is s1 in the order of dx.
    static constexpr int left = 0, factor_bytes = 2 * n * factor_row, right2 = left + factor_bytes;  // [part][i][u]
    static constexpr int expanding = right2 + factor_bytes;
    static constexpr int rule_pad = 4, matrix = n * n + rule_pad;
    static constexpr int rule = expanding + n * factor_row, rule2 = rule + n * matrix * 4;
    static constexpr int narrow = rule2 + n * matrix * 4, narrow2 = narrow + d * 4, bias = narrow2 + d * 4;

    static constexpr int rest = bias + d * 4;                // what rounding took from C1
    static constexpr int middle = rest + n * n * d * 2;      // dy, h: [side][part][token][c]
    static constexpr int parts = middle + 4 * middle_bytes;  // of y and dh: [warp][eight][half][lane][2]
    static constexpr int ring = parts + warps * eights * 512;
    static constexpr int stages = 3, bytes = ring + stages * tile;  // of the ring
};

// Calls body(Sides{}) with the compiled shape of these sizes and returns true, or returns false.
template <class Body>
bool with_sides(const Sizes& s, const Body& body) {
    using S = Sides<12, 768, 48>;
    if (s.n != S::n || s.rank != 1 || s.in != S::chunk || s.out != S::chunk || s.inner != S::inner) return false;
    return body(S{}), true;
}

// Row r of a matrix of eight tokens is this token: so that the rows of token pairs 2m, 2m + 1 are 64 bytes apart in the
// banks, and lanes that read 16 bytes of a row each, four of a row, meet different banks.
COMPACTER_DEVICE int token_of_row(int r) { return r / 2 + r % 2 * 4; }

template <class S>
struct SidePart {
    const Backward& b;
    const int warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x / 32), 0);  // the same for all lanes
    const int side = warp / S::pairs, pair = warp % S::pairs;                         // side 0 has x, side 1 has g

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
    COMPACTER_DEVICE int valid(int tile) const {
        const int64_t remaining = b.tokens - int64_t{tile} * S::tokens;
        return remaining < S::tokens ? static_cast<int>(remaining) : S::tokens;
    }

    // Starts to copy the warp's part: 16 bytes a lane, zeros for the tokens that are missing.
    COMPACTER_DEVICE void load(int tile, int stage) const {
        const auto* from = static_cast<const unsigned char*>(side ? b.grad_out : b.x) + int64_t{tile} * S::tokens * S::width * 2;
        constexpr int vectors = S::chunk / 4, at_once = 32 / vectors;
        static_assert(32 % vectors == 0);
        const int lane = lane_anew(), count = valid(tile), token = lane / vectors, at = first() + lane % vectors * 16;
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

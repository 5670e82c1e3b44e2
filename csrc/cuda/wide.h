// The shape that the wide kernel of the backward is compiled for, its layout of shared memory, and a warp's part of it.
//
// A block has four tokens at a time. Each of its n warps has a share of the columns of every chunk: 64, a line of 128
// bytes. So a warp's part of x is a line for each chunk of each token, and it loads and reads its part by itself.
#pragma once

#include "kernels.h"
#include "ring.h"

namespace compacter::cuda {

// An adapter of width Width and bottleneck width Narrow.
template <int Dim, int Width, int Narrow>
struct Wide {
    static constexpr int n = Dim, width = Width, chunk = Width / Dim, d = Narrow, inner = Narrow / Dim;
    static constexpr int tokens = 4, stages = 2, warps = n, pairs = n / 2;
    static constexpr int columns = chunk / warps, blocks = columns / 16;  // of a chunk, of a warp: single, and in 16s
    static_assert(n == 8 && columns == 64 && inner == 16, "a line has 128 bytes, a chunk of the bottleneck 16 numbers");

    // Of a warp: the tiles, x and then g of each; the lines [part][i] of s1 and of t2.
    static constexpr int line = columns * 2, side = tokens * n * line, factor = 2 * n * line;
    static constexpr int factors = stages * 2 * side, of_warp = factors + 2 * factor;
    // Of the block: C1 and C2, whose rows are an odd multiple of 16 bytes, so that ldmatrix meets different banks.
    static constexpr int folded = warps * of_warp, folded_row = (d / 8 | 1) * 16, folded_side = n * n * folded_row;
    // What the warps exchange (backward_wide.cu), and the small parameters in fp32 (wide_weights.h).
    static constexpr int partial = folded + 2 * folded_side;       // of Z and dV2: [side][pair][warp][lane]
    static constexpr int z = partial + 2 * pairs * warps * 256;    // Z and dV2: [side][(p,i)]
    static constexpr int narrow = z + 2 * n * n * 16;              // dy and h: [side][(q,v)]
    static constexpr int mixed = narrow + 2 * d * 16;              // dZ and V2: [side][part][pair][i]
    static constexpr int small = mixed + 2 * 2 * pairs * n * 16;   // rules, t1 and s2, b1
    static constexpr int matrix = n * n + 4, row = inner + 1;      // of a rule, of t1 or s2: the lanes meet other banks
    static constexpr int bytes = small + (2 * n * (matrix + row) + d) * 4;
};

// Calls body(Wide{}) with the compiled shape of these sizes and returns true, or returns false.
template <class Body>
bool with_wide(const Sizes& s, const Body& body) {
    using S = Wide<8, 4096, 128>;
    return are_of<S>(s) && (body(S{}), true);
}

// Row `row` of 16 bytes of what begins at byte `rows`.
COMPACTER_DEVICE unsigned char* row_at(int rows, int row) { return shared_memory() + rows + row * 16; }

// The byte in a warp's lines where eight columns of a line begin. Eights have other places in each of eight lines, so
// that ldmatrix meets different banks, and in two neighbouring lines, of which a 128-bit load reads four eights each.
// A block of 16 columns further is this number ^ 32.
COMPACTER_DEVICE int in_lines(int line, int eight) { return line * 128 + (eight ^ (line % 2 * 4 + line % 8 / 2)) * 16; }

// A warp's part of the tiles: lines [chunk][token].
template <class S>
struct WidePart {
    const Backward& b;
    int warp = warp_index();

    COMPACTER_DEVICE explicit WidePart(const Backward& b) : b(b) {}

    COMPACTER_DEVICE unsigned char* own() const { return shared_memory() + warp * S::of_warp; }
    COMPACTER_DEVICE unsigned char* rows(int stage) const { return own() + stage * 2 * S::side; }

    // Between the projections, half of the warps have the side of x, the others that of g, and each a pair of chunks.
    COMPACTER_DEVICE int side() const { return warp / S::pairs; }
    COMPACTER_DEVICE int pair() const { return warp % S::pairs; }

    // Where a lane points for ldmatrix of 16 columns of two pairs of chunks: the matrices are the first eight columns
    // of the first pair, the next eight, then both of the second pair. Rows are a pair's chunks and tokens.
    COMPACTER_DEVICE static int block_at(int lane) { return in_lines(lane / 16 * 8 + lane % 8, lane / 8 % 2); }

    // Where a token's columns of the warp begin in a row of x, in bytes.
    COMPACTER_DEVICE int64_t first(int tile, int token) const {
        return (int64_t{tile} * S::tokens + token) * S::width * 2 + warp * S::line;
    }
    COMPACTER_DEVICE bool exists(int tile, int token) const { return int64_t{tile} * S::tokens + token < b.tokens; }

    // Starts to copy x or g of a tile. Eight lanes copy a line; those of absent tokens are zeros.
    COMPACTER_DEVICE void load(const void* tensor, unsigned char* to, int tile) const {
        const int lane = lane_anew(), token = lane / 8, at = in_lines(token, lane % 8);
        const bool real = exists(tile, token);
        const auto* from = static_cast<const unsigned char*>(tensor) + (real ? first(tile, token) : 0) + lane % 8 * 16;
#pragma unroll
        for (int chunk = 0; chunk < S::n; ++chunk)
            copy_async(to + chunk * S::tokens * S::line + (at ^ chunk % 2 * 32), from + chunk * S::chunk * 2, real);
    }
};

}  // namespace compacter::cuda

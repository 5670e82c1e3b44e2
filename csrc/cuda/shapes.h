// The shapes that the folded kernel of the backward is compiled for, and its layout of shared memory.
#pragma once

#include "folded.h"
#include "sizes.h"

namespace compacter::cuda {

// An adapter of width Wide and bottleneck width Narrow. A group of Group warps has a tile of eight tokens; each warp
// has whole pairs of chunks, and as many eights of the bottleneck as the others.
template <int Dim, int Wide, int Narrow, int Group>
struct Shape {
    static constexpr int n = Dim, width = Wide, chunk = Wide / Dim, d = Narrow, inner = Narrow / Dim, group = Group;
    static constexpr int tokens = 8;
    static constexpr int pairs = n / 2, own = pairs / group;       // pairs of chunks: of a token, of a warp
    static constexpr int eights = d / 8, share = eights / group;   // eights of the bottleneck: of a token, of a warp
    static constexpr int steps = (eights + 1) / 2;                 // of 16 numbers of the bottleneck
    static constexpr int blocks = chunk / 16;                      // of 16 columns of a chunk

    // Four of the eight columns of a product are free for n = 4: they have a second part, or another block.
    static constexpr int parts = n == 4 ? 2 : 1;                   // of C1 and C2
    static constexpr int row_tiles = own * n / 8;                  // of 16 rows (p,i) of the warp in dC1
    static constexpr int left_tiles = (blocks + parts - 1) / parts, bias_tiles = n == 4 ? 0 : (blocks * own + 3) / 4;
    static_assert((n == 4 || n == 8) && chunk % 16 == 0 && d % 8 == 0 && pairs % group == 0 && eights % group == 0);

    // Rows in shared memory are odd multiples of 16 bytes, so that ldmatrix meets eight different banks.
    static constexpr int row = (width / 8 | 1) * 16, factor_row = (chunk / 8 | 1) * 16, folded_row = (d / 8 | 1) * 16;
    static constexpr int folded_part = n == 4 ? (n * n * folded_row + 127) / 128 * 128 + 64 : n * n * folded_row;
    static constexpr int tile = 2 * tokens * row;  // rows of x, then rows of g

    static constexpr int left = 0, right2 = left + 2 * n * factor_row;  // [part][i][u]
    static constexpr int folded = right2 + 2 * n * factor_row, folded2 = folded + parts * folded_part;
    static constexpr int raw = folded2 + parts * folded_part;  // all parameters in fp32 (folded.h)
    static constexpr int raw_floats = RawFactors::floats(n, chunk, d);
    static constexpr int exchange = raw + raw_floats * 4, exchange_bytes = group > 1 ? 2 * (pairs + steps) * 512 : 0;
    static_assert(raw_floats % 4 == 0);

    // The places of the sums of a rank, a vector for each lane, which take the place of the first group's tiles (sums.h).
    static constexpr int at_right2 = left_tiles, at_folded = at_right2 + blocks, at_folded2 = at_folded + row_tiles * eights;
    static constexpr int at_bias = at_folded2 + row_tiles * eights, at_bias2 = at_bias + share, places = at_bias2 + bias_tiles;
    static constexpr int sums_bytes = group * places * 512;
    // Behind them dC1 and dC2, [(p,i)][c] in fp32; rows of an odd number of words.
    static constexpr int plain_row = d | 1, plain = n * n * plain_row, all_bytes = sums_bytes + (2 * plain * 4 + 15) / 16 * 16;

    COMPACTER_BOTH static constexpr int ring(int groups) { return exchange + groups * exchange_bytes; }
    COMPACTER_BOTH static constexpr int bytes(int groups, int stages) {
        return ring(groups) + (groups * of_group(stages) < all_bytes ? all_bytes : groups * of_group(stages));
    }
    COMPACTER_BOTH static constexpr int of_group(int stages) { return stages * tile < sums_bytes ? sums_bytes : stages * tile; }
};

// Calls body(Shape{}) with the compiled shape of these sizes and returns true, or returns false.
template <class Body>
bool with_shape(const Sizes& s, const Body& body) {
    const auto is = [&](int n, int width, int d) {
        return s.n == n && s.rank == 1 && s.in * n == width && s.out * n == width && s.inner * n == d;
    };
    if (is(4, 768, 24)) return body(Shape<4, 768, 24, 1>{}), true;
    if (is(8, 1024, 64)) return body(Shape<8, 1024, 64, 4>{}), true;
    return false;
}

}  // namespace compacter::cuda

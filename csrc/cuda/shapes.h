// The shapes that the folded kernel of the backward is compiled for, and its layout of shared memory.
#pragma once

#include <numeric>

#include "sizes.h"

namespace compacter::cuda {

COMPACTER_BOTH constexpr int larger(int a, int b) { return a < b ? b : a; }

// An adapter of width Wide and bottleneck width Narrow. A group of Group warps has a tile of eight tokens; each warp
// has whole pairs of chunks, and as many eights of the bottleneck as the others.
template <int Dim, int Wide, int Narrow, int Group>
struct Shape {
    static constexpr int n = Dim, width = Wide, chunk = Wide / Dim, d = Narrow, inner = Narrow / Dim, group = Group;
    static constexpr int tokens = 8, most_groups = 8 / group;
    static constexpr int pairs = n / 2, own = pairs / group;       // pairs of chunks: of a token, of a warp
    static constexpr int eights = d / 8, share = eights / group;   // eights of the bottleneck: of a token, of a warp
    static constexpr int steps = (eights + 1) / 2;                 // of 16 numbers of the bottleneck
    static constexpr int blocks = chunk / 16;                      // of 16 columns of a chunk

    // Four of the eight columns of a product are free for n = 4: they have a second part, or another block.
    static constexpr int parts = n == 4 ? 2 : 1;                   // of C2
    static constexpr int row_tiles = own * n / 8;                  // of 16 rows (p,i) of the warp in dC1
    static constexpr int left_tiles = (blocks + parts - 1) / parts, bias_tiles = n == 4 ? 0 : (blocks * own + 3) / 4;
    static_assert((n == 4 || n == 8) && chunk % 16 == 0 && d % 8 == 0 && inner % 2 == 0);
    static_assert(pairs % group == 0 && eights % group == 0 && (group == 1 || share % 2 == 0));

    // Rows in shared memory are odd multiples of 16 bytes, so that ldmatrix meets eight different banks.
    static constexpr int row = (width / 8 | 1) * 16, factor_row = (chunk / 8 | 1) * 16, folded_row = (d / 8 | 1) * 16;
    static constexpr int folded_part = n == 4 ? (n * n * folded_row + 127) / 128 * 128 + 64 : n * n * folded_row;
    static constexpr int tile = 2 * tokens * row;  // rows of x, then rows of g

    static constexpr int left = 0, right2 = left + 2 * n * factor_row;  // [part][i][u]
    static constexpr int folded = right2 + 2 * n * factor_row, folded2 = folded + 2 * folded_part;
    // The narrow parameters in fp32. The matrices of a rule are padded, so that the lanes read from different banks.
    static constexpr int rule_pad = 4, matrix = n * n + rule_pad;
    static constexpr int rule = folded2 + parts * folded_part, rule2 = rule + n * matrix * 4;
    static constexpr int narrow = rule2 + n * matrix * 4, narrow2 = narrow + d * 4, bias = narrow2 + d * 4;
    static constexpr int exchange = bias + d * 4, exchange_bytes = group > 1 ? 2 * (pairs + steps) * 512 : 0;

    // The places of the sums of a warp, a vector for each lane (sums.h): the wide ones, the bias, then dC1 and dC2.
    static constexpr int at_right2 = left_tiles, at_bias2 = at_right2 + blocks;
    static constexpr int wide = at_bias2 + bias_tiles, at_bias = wide, at_folded = at_bias + share;
    static constexpr int at_folded2 = at_folded + row_tiles * eights, places = at_folded2 + row_tiles * eights;
    // At the end, the wide ones take the place of a group's tiles, and what the others give to the narrow gradients is behind
    // them (totals.h). The columns (q,v) of dC1 have the same v again after `cycle` eights.
    static constexpr int cycle = inner / std::gcd(inner, 8);
    static constexpr int wide_bytes = group * wide * 512, narrow_bytes = 2 * n * (matrix * 4 + group * cycle * 32) + d * 4;

    COMPACTER_BOTH static constexpr int ring(int groups) { return exchange + groups * exchange_bytes; }
    COMPACTER_BOTH static constexpr int bytes(int groups, int stages) { return ring(groups) + groups * of_group(stages); }
    COMPACTER_BOTH static constexpr int of_group(int stages) { return larger(stages * tile, wide_bytes + narrow_bytes); }
};

// Calls body(Shape{}) with the compiled shape of these sizes and returns true, or returns false.
template <class Body>
bool with_shape(const Sizes& s, const Body& body) {
    const auto serves = [&](auto shape) { return are_of<decltype(shape)>(s) && (body(shape), true); };
    return serves(Shape<4, 768, 24, 1>{}) || serves(Shape<8, 1024, 64, 4>{});
}

}  // namespace compacter::cuda

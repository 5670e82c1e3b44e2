// A group of warps, and its ring of token tiles in shared memory. A warp owns a part of each tile: some
// chunks, and of these a share of the columns. It loads, changes and stores its part by itself.
#pragma once

#include "kernels.h"
#include "pairs.h"

namespace compacter::cuda {

// The warps that share a tile.
struct Group {
    int warps, index, rank, count;

    COMPACTER_DEVICE explicit Group(int warps)
        : warps(warps), index(static_cast<int>(threadIdx.x) / (warps * 32)),
          rank(static_cast<int>(threadIdx.x) / 32 - index * warps), count(static_cast<int>(blockDim.x) / (warps * 32)) {}
    COMPACTER_DEVICE void sync() const { sync_threads(index + 1, warps * 32); }
};

// A warp's part of the tiles. Eight lanes move 128 bytes of one chunk of one token, so a warp moves four
// of these lines at once.
template <int N>
struct TilePart {
    using P = Pairs<N>;
    static constexpr int at_once = 4 / P::chunks, lines = tile_tokens / at_once;  // tokens of four lines; of a lane

    const PairSizes& s;
    int owner, share;      // which chunks, which columns
    int first;             // bytes from the start of a token to the part
    int blocks, vectors;   // columns of a chunk in it, in 16s and in eights
    int token, line;       // what a lane moves: its first token, and the bytes in the part of a token

    COMPACTER_DEVICE TilePart(const PairSizes& s, int rank) : s(s), owner(rank / s.shares), share(rank - owner * s.shares) {
        const int all = s.in / 16, begin = all * share / s.shares, lane = static_cast<int>(threadIdx.x) % 32;
        blocks = all * (share + 1) / s.shares - begin;
        vectors = blocks * 2;
        first = owner * P::chunks * s.in * 2 + begin * 32;
        token = lane / 8 / P::chunks;
        line = lane / 8 % P::chunks * s.in * 2 + lane % 8 * 16;
    }

    // The first column of the part, in blocks of 16.
    COMPACTER_DEVICE int first_block() const { return s.in / 16 * share / s.shares; }

    // Starts to copy the part of a tile whose first token is at `from`; zeros for tokens from `valid` on.
    COMPACTER_DEVICE void load(unsigned char* tile, const void* from, int valid) const {
        unsigned char* to = tile + first + token * s.row + line;
        const unsigned char* source = static_cast<const unsigned char*>(from) + first + token * s.width * 2 + line;
        for (int v = static_cast<int>(threadIdx.x) % 8; v < vectors; v += 8, to += 128, source += 128)
#pragma unroll
            for (int j = 0; j < lines; ++j)
                copy_async(to + j * at_once * s.row, source + j * at_once * s.width * 2, token + j * at_once < valid);
    }

    // Stores the part of a tile whose first token is at `to`, if the lanes of the warp have met.
    COMPACTER_DEVICE void store(const unsigned char* tile, void* to, int valid) const {
        const unsigned char* from = tile + first + token * s.row + line;
        unsigned char* target = static_cast<unsigned char*>(to) + first + token * s.width * 2 + line;
        for (int v = static_cast<int>(threadIdx.x) % 8; v < vectors; v += 8, from += 128, target += 128) {
            uint4 eight[lines];
#pragma unroll
            for (int j = 0; j < lines; ++j) eight[j] = *reinterpret_cast<const uint4*>(from + j * at_once * s.row);
#pragma unroll
            for (int j = 0; j < lines; ++j)
                if (token + j * at_once < valid)
                    store_streaming(reinterpret_cast<uint4*>(target + j * at_once * s.width * 2), eight[j]);
        }
    }
};

}  // namespace compacter::cuda

// A group of warps, and its ring of token tiles in shared memory. A warp owns a part of each tile: some
// chunks, and of these a share of the columns. It loads, changes and stores its part by itself.
#pragma once

#include "kernels.h"
#include "pairs.h"

namespace compacter::cuda {

// The number of the warp, of which the compiler then knows that all lanes have the same.
COMPACTER_DEVICE int warp_index() { return __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x / 32), 0); }

// The tokens of a tile that exist.
template <class S>
COMPACTER_DEVICE int valid_tokens(const Backward& b, int tile) {
    const int64_t remaining = b.tokens - int64_t{tile} * S::tokens;
    return remaining < S::tokens ? static_cast<int>(remaining) : S::tokens;
}

// The warps that share a tile: `owners` for its chunks, and 2^log_shares for the columns of each.
struct Group {
    int warps, index, rank, count;

    COMPACTER_DEVICE Group(int owners, int log_shares, int warp = warp_index())
        : warps(owners << log_shares), index((warp >> log_shares) / owners), rank(warp - index * warps),
          count((blockDim.x / 32 >> log_shares) / owners) {}
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
    int first_block;       // the first column, in 16s
    int first;             // bytes from the start of a token to the part
    int blocks, vectors;   // columns of a chunk in it, in 16s and in eights
    int token, line;       // what a lane moves: its first token, and the bytes in the part of a token

    COMPACTER_DEVICE TilePart(const PairSizes& s, int rank)
        : s(s), owner(rank >> s.log_shares), share(rank & (s.shares() - 1)) {
        const int all = s.in / 16, lane = threadIdx.x % 32;
        first_block = all * share >> s.log_shares;
        blocks = (all * (share + 1) >> s.log_shares) - first_block;
        vectors = blocks * 2;
        first = owner * P::chunks * s.in * 2 + first_block * 32;
        token = lane / 8 / P::chunks;
        line = lane / 8 % P::chunks * s.in * 2 + lane % 8 * 16;
    }

    // Starts to copy the part of a tile whose first token is at `from`; zeros for tokens from `valid` on.
    COMPACTER_DEVICE void load(unsigned char* tile, const void* from, int valid) const {
        if (valid == tile_tokens) load<true>(tile, from, valid);
        else load<false>(tile, from, valid);
    }

    // Stores the part of a tile whose first token is at `to`. The lanes of the warp have met.
    COMPACTER_DEVICE void store(const unsigned char* tile, void* to, int valid) const {
        if (valid == tile_tokens) store<true>(tile, to, valid);
        else store<false>(tile, to, valid);
    }

    // Makes the part of a tile NaN.
    COMPACTER_DEVICE void poison(unsigned char* tile) const {
        for (int v = threadIdx.x % 8; v < vectors; v += 8)
#pragma unroll
            for (int j = 0; j < lines; ++j)
                *reinterpret_cast<uint4*>(tile + first + (token + j * at_once) * s.row + line + (v - threadIdx.x % 8) * 16) =
                    make_uint4(0x7fff7fff, 0x7fff7fff, 0x7fff7fff, 0x7fff7fff);
    }

  private:
    template <bool Whole>
    COMPACTER_DEVICE void load(unsigned char* tile, const void* from, int valid) const {
        unsigned char* to = tile + first + token * s.row + line;
        const unsigned char* source = static_cast<const unsigned char*>(from) + first + token * s.width * 2 + line;
        const int step = at_once * s.width * 2;
        for (int v = threadIdx.x % 8; v < vectors; v += 8, to += 128, source += 128) {
            unsigned char* to_token = to;
            const unsigned char* of_token = source;
#pragma unroll
            for (int j = 0; j < lines; ++j, to_token += at_once * s.row, of_token += step)
                copy_async(to_token, of_token, Whole || token + j * at_once < valid);
        }
    }

    template <bool Whole>
    COMPACTER_DEVICE void store(const unsigned char* tile, void* to, int valid) const {
        const unsigned char* from = tile + first + token * s.row + line;
        unsigned char* target = static_cast<unsigned char*>(to) + first + token * s.width * 2 + line;
        const int step = at_once * s.width * 2;
        for (int v = threadIdx.x % 8; v < vectors; v += 8, from += 128, target += 128) {
            uint4 eight[lines];
            const unsigned char* of_token = from;
#pragma unroll
            for (int j = 0; j < lines; ++j, of_token += at_once * s.row) eight[j] = *reinterpret_cast<const uint4*>(of_token);
            unsigned char* to_token = target;
#pragma unroll
            for (int j = 0; j < lines; ++j, to_token += step)
                if (Whole || token + j * at_once < valid) *reinterpret_cast<uint4*>(to_token) = eight[j];
        }
    }
};

}  // namespace compacter::cuda

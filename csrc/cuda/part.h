// A warp's part of the tiles of x and g in shared memory, for the shapes of shapes.h: whole pairs of chunks. The warp
// loads, changes and stores its part by itself.
#pragma once

#include "kernels.h"
#include "pairs.h"
#include "ring.h"
#include "shapes.h"
#include "stage.h"

namespace compacter::cuda {

template <class S>
struct Part {
    const Backward& b;
    Group group{S::group, 0};

    COMPACTER_DEVICE explicit Part(const Backward& b) : b(b) {}

    COMPACTER_DEVICE void sync() const {
        if constexpr (S::group == 1) __syncwarp();
        else group.sync();
    }
    // The tokens of a block are neighbours. All blocks have as many, or one more, and so as many bytes to move. The tiles
    // of a block are numbered from 0.
    COMPACTER_DEVICE int tokens() const { return b.block_tokens + (block_anew() < b.longer_blocks); }
    COMPACTER_DEVICE int tiles() const { return (tokens() + S::tokens - 1) / S::tokens; }
    COMPACTER_DEVICE int valid_tokens(int tile) const {
        const int remaining = tokens() - tile * S::tokens;
        return remaining < S::tokens ? remaining : S::tokens;
    }
    // Where a tile begins in x, in bytes.
    COMPACTER_DEVICE int64_t start(int tile) const {
        const int block = block_anew(), longer = block < b.longer_blocks ? block : b.longer_blocks;
        return (int64_t{b.block_tokens} * block + longer + tile * S::tokens) * S::width * 2;
    }

    // The number of the warp's pair s, or of its first eight of the bottleneck.
    COMPACTER_DEVICE int pair(int s) const { return group.rank * S::own + s; }
    COMPACTER_DEVICE int first_eight() const { return group.rank * S::share; }

    // Where a lane points for ldmatrix and stmatrix of a block as it is (pairs.h), or transposed: as a left operand
    // whose rows are columns u to u + 15, first of chunk 2j, then of chunk 2j + 1. Bytes from the start of a tile.
    COMPACTER_DEVICE int first() const { return pair(0) * 4 * S::chunk; }
    COMPACTER_DEVICE int block(int lane) const { return block_offset(lane, S::row, S::chunk * 2) + first(); }
    COMPACTER_DEVICE int transposed(int lane) const {
        return lane % 8 * S::row + lane / 16 * S::chunk * 2 + lane / 8 % 2 * 16 + first();
    }

    // The rows of x of the group's tile; those of g follow.
    COMPACTER_DEVICE unsigned char* rows(int stage) const {
        return shared_memory() + S::ring(group.count) + group.index * S::of_group(b.stages) + stage * S::tile;
    }

    COMPACTER_DEVICE void load(int tile, int stage) const {
        load_from([&] { return start(tile); }, [&] { return valid_tokens(tile); }, stage);
    }

    // The same for a tile that begins at begin() in x and has valid() tokens.
    template <class Begin, class Valid>
    COMPACTER_DEVICE void load_from(const Begin& begin, const Valid& valid, int stage) const {
        const auto* x = static_cast<const unsigned char*>(b.x) + begin();
        const auto* g = static_cast<const unsigned char*>(b.grad_out) + begin();
        unsigned char* to = rows(stage);
        const int count = valid();
        const auto copy = [&](auto all) {  // all: no token is missing
            for_each_vector([&](int token, int at) {
                const bool real = decltype(all)::value || token < count;
                const int from = (real ? token * S::width * 2 : 0) + at;
                copy_async(to + token * S::row + at, x + from, real);
                copy_async(to + (S::tokens + token) * S::row + at, g + from, real);
            });
        };
        if (count == S::tokens) copy(std::true_type{});
        else copy(std::false_type{});
    }

    // Stores dx, which has taken the place of x.
    COMPACTER_DEVICE void store(int tile, int stage) const {
        store_to([&] { return start(tile); }, [&] { return valid_tokens(tile); }, stage);
    }
    template <class Begin, class Valid>
    COMPACTER_DEVICE void store_to(const Begin& begin, const Valid& valid, int stage) const {
        auto* to = static_cast<unsigned char*>(b.grad_x) + begin();
        const unsigned char* from = rows(stage);
        const int count = valid();
        for_each_vector([&](int token, int at) {
            if (token < count)
                *reinterpret_cast<uint4*>(to + token * S::width * 2 + at) =
                    *reinterpret_cast<const uint4*>(from + token * S::row + at);
        });
    }

    // Lets the groups do something one after another, `at_once` at a time: a warp waits for that of its rank before.
    template <class Body>
    COMPACTER_DEVICE void in_turn(int at_once, const Body& body) const {
        constexpr int barriers = 8;  // from this one on, two warps each
        const int warp = group.index * S::group + group.rank;
        if (group.index >= at_once) sync_threads(barriers + warp - at_once * S::group, 64);
        body();
        if (group.index + at_once < group.count) sync_threads(barriers + warp, 64);
    }

  private:
    // body(token, bytes from its start) for the vectors of this lane.
    template <class Body>
    COMPACTER_DEVICE void for_each_vector(const Body& body) const {
        constexpr int vectors = S::own * 2 * S::chunk / 8;
        const int lane = lane_anew();
#pragma unroll
        for (int token = 0; token < S::tokens; ++token)
#pragma unroll
            for (int begin = 0; begin < vectors; begin += 32)
                if (begin + 32 <= vectors || begin + lane < vectors) body(token, first() + (begin + lane) * 16);
    }
};

}  // namespace compacter::cuda

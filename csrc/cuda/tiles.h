// The tiles of a launch, and their rows in memory, which need not be neighbours.
#pragma once

#include "columns.h"
#include "family.h"
#include "stage.h"

namespace compacter::cuda {

struct Tile {
    int adapter;       // of the bank; or the number of adapters: none; or one more: the route is out of range
    int first, count;  // tokens, in the order of their adapters
};

struct Range {
    int begin, end;
};

struct Tiles {
    const Tiling& t;

    COMPACTER_DEVICE int count() const { return t.table ? t.table[0] : (t.all + t.tokens - 1) / t.tokens; }
    // Those that have an adapter, which come first.
    COMPACTER_DEVICE int with_adapter() const { return t.table ? t.table[t.starts() + t.adapters] : count(); }
    // The tiles of each program, of which the last ones may have fewer.
    COMPACTER_DEVICE int share(int programs) const { return (count() + programs - 1) / programs; }
    // Those of this block, of which each is a program.
    COMPACTER_DEVICE Range of_block() const {
        const int each = share(gridDim.x), begin = blockIdx.x * each;
        return {begin, min(begin + each, count())};
    }
    COMPACTER_DEVICE Tile at(int tile) const {
        if (t.table) {
            const int* entry = t.table + t.tiles() + 3 * tile;
            return {entry[0], entry[1], entry[2]};
        }
        const int first = tile * t.tokens;
        return {0, first, t.all - first < t.tokens ? t.all - first : t.tokens};
    }
    // The token at a place in the order of the adapters.
    COMPACTER_DEVICE int token(int place) const {
        if (!t.table) return place;
        const int group = place / t.group;
        return t.table[t.order() + group] * t.group + place - group * t.group;
    }
    // The programs that have tiles of an adapter, from the first to before the last; none if it does not occur.
    COMPACTER_DEVICE Range programs(int programs, int adapter) const {
        const int first = t.table ? t.table[t.starts() + adapter] : 0;
        const int end = t.table ? t.table[t.starts() + adapter + 1] : count();
        if (first == end) return {0, 0};
        const int each = share(programs);
        return {first / each, (end - 1) / each + 1};
    }
};

// All threads of the block write the tokens of a tile to shared memory, -1 for those that do not exist.
COMPACTER_DEVICE void stage_tokens(int* ids, const Tiles& tiles, const Tile& tile) {
    for (int j = threadIdx.x; j < tiles.t.tokens; j += blockDim.x) ids[j] = j < tile.count ? tiles.token(tile.first + j) : -1;
}

// The block asks for the rows of a tile, whose loads then find them in the L2.
template <class T>
COMPACTER_DEVICE void prefetch_tile(const Tiles& tiles, int tile, const T* rows, int width) {
    constexpr int line = 128 / sizeof(T);
    const Tile next = tiles.at(tile);
    for (int j = threadIdx.x / 32; j < next.count; j += blockDim.x / 32) {
        const T* const row = rows + int64_t{tiles.token(next.first + j)} * width;
        for (int column = threadIdx.x % 32 * line; column < width; column += 32 * line) prefetch(row + column);
    }
}

// The weight of a slot for a token: 1 if the adapters are not mixed, 0 for a token that does not exist.
COMPACTER_DEVICE float weight_of(const Family& f, int slot, int token) {
    if (!f.mixed) return 1.f;
    return token < 0 ? 0.f : read(f.mix, int64_t{token / f.tiling.group} * f.slots + slot);
}

// The weights of the tokens of a tile, [slot][token].
COMPACTER_DEVICE void stage_mix(float* weights, const int* ids, const Family& f) {
    const int tokens = f.tiling.tokens;
    for (int e = threadIdx.x; e < tokens * f.slots; e += blockDim.x) weights[e] = weight_of(f, e / tokens, ids[e % tokens]);
}

// Two rows of a tile, eight apart, as a lane has them in a product of 16 rows.
template <class T>
struct LaneRows {
    using Number = std::remove_const_t<T>;
    T *upper, *lower;
    int upper_width, lower_width;  // 0 if there is no such row
    bool vectors;

    // row: g or g + 8. Whole: the eight exist and are aligned; a row that does not exist has those of another one.
    template <bool Whole>
    COMPACTER_DEVICE Eight<Number> load(int row, int column) const {
        if constexpr (Whole) return load_eight<Number>((row & 8 ? lower : upper) + column, 8, true);
        return load_eight<Number>((row & 8 ? lower : upper) + column, (row & 8 ? lower_width : upper_width) - column, vectors);
    }
    COMPACTER_DEVICE void store(int row, int column, const Eight<T>& eight) const {
        store_eight((row & 8 ? lower : upper) + column, eight, (row & 8 ? lower_width : upper_width) - column, vectors);
    }
    COMPACTER_DEVICE LaneRows from(int column) const {
        return {upper + column, lower + column, upper_width - column, lower_width - column, vectors};
    }
};

// The rows of a tile, n for each token.
template <class T>
struct TileRows {
    T* all;
    const int* ids;
    int n;
    Divisor by_n, by_groups;  // of 16 rows
    int rows, width;
    bool vectors;

    COMPACTER_DEVICE bool whole() const { return vectors && width % segment == 0; }
    // Where a row begins, or null.
    COMPACTER_DEVICE T* at(int row) const {
        if (row >= rows) return nullptr;
        const int token = by_n.quotient(row), id = ids[token];
        return id < 0 ? nullptr : all + (int64_t{id} * n + row - token * n) * width;
    }
    // The rows of a lane in a product whose first row is `row`.
    COMPACTER_DEVICE LaneRows<T> of_lane(int row) const {
        const Lane lane;
        T *const upper = at(row + lane.g), *const lower = at(row + lane.g + 8);
        return {upper ? upper : all, lower ? lower : all, upper ? width : 0, lower ? width : 0, vectors};
    }
};

template <class T>
COMPACTER_DEVICE TileRows<T> rows_of_x(T* all, const int* ids, const Family& f) {
    return {all, ids, f.n_in, f.by_n_in, f.by_groups_in, f.middle.tokens * f.n_in, f.middle.in, f.middle.in_vectors};
}
template <class T>
COMPACTER_DEVICE TileRows<T> rows_of_out(T* all, const int* ids, const Family& f) {
    return {all, ids, f.n_out, f.by_n_out, f.by_groups_out, f.middle.tokens * f.n_out, f.middle.out, f.middle.out_vectors};
}

}  // namespace compacter::cuda

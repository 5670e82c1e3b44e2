// The arguments of the kernels for the whole family: a bank of Compacter adapters or of plain bottlenecks, of which each
// row has one or a weighted sum of all; one plain bottleneck; a sum of Kronecker products of any shape.
//
//     Z[p,c] = sum_u x[p,u] s_c[u]    V2 = middle(Z)    out[q,u] = sum_c V2[q,c] t_c[u] + b[q,u] + residual
//
// A tile is tokens of one adapter. Between the wide factors its numbers are X[c][token][p], with p fastest and padded with
// zeros to a multiple of four; a plain bottleneck has one p. There is one slot of m numbers c, for the adapter of the tile, or
// one for each adapter of the bank if they are mixed.
#pragma once

#include "kernels.h"

namespace compacter::cuda {

// A wide factor or a bias: the number of adapter e, c = (i, rho) and u is at e of_adapter + i of_i + rho of_rho + u of_u.
struct Factor {
    Array array;
    int64_t of_adapter;
    int of_i, of_rho, of_u;

    // Whether neighbours in memory are neighbours c.
    COMPACTER_BOTH bool columns_first() const { return of_u > 1 && of_i == 1; }
    COMPACTER_BOTH int64_t at(int adapter, int i, int rho, int u) const {
        return adapter * of_adapter + static_cast<int64_t>(i) * of_i + rho * of_rho + static_cast<int64_t>(u) * of_u;
    }
};

// What family_table.cu writes, as ints: how many tiles there are; the first tile of each adapter, of the rows without one,
// of those whose number is out of range, and the end; for each tile its adapter, its first token and how many it has; the
// groups in the order of their adapters. Without a route all tokens are those of adapter 0, and there is no table.
struct Tiling {
    const int* table;
    int adapters, tokens;  // of the bank; of a tile
    int all, group;        // all tokens, and those of a group, which follow one another
    int most;              // tiles that there can be

    COMPACTER_BOTH int buckets() const { return adapters + 2; }
    COMPACTER_BOTH int starts() const { return 1; }
    COMPACTER_BOTH int tiles() const { return starts() + buckets() + 1; }
    COMPACTER_BOTH int order() const { return tiles() + 3 * most; }
    int64_t ints() const { return int64_t{order()} + all / std::max(group, 1); }
};

// The rule and the small factor beside it as one matrix (family_folded.h), in shared memory as [part][row][column] in bf16.
// Z, dV2, h and dy of a tile are [part][token][slot][number] then.
struct Folded {
    int rows, padded_rows;    // n m, and the next multiple of 16; 0 if nothing is folded
    int parts;
    int width, padded_width;  // of the bottleneck, and the next multiple of eight
    int stride;               // numbers from one row to the next, an odd multiple of eight
    int z_stride, h_stride;   // numbers from one token to the next
    Divisor by_n, by_slots, by_groups, by_rows;  // groups of 16 tokens, and of 16 rows

    COMPACTER_BOTH int64_t bytes(int parts) const { return int64_t{2} * parts * padded_rows * stride; }
    COMPACTER_BOTH int blocks() const { return (width + 15) / 16; }
};

// The sizes of a problem, and its parameters.
struct Family {
    Sizes middle;       // of one slot: n is padded, and the widths in and out are those of x and of the output
    int slots, n_in, n_out;
    int columns;        // slots * m
    int right_terms;    // the same with the rows of the bias, one for each slot and q
    int rows_in, rows_out;  // of a tile, multiples of 16
    int stride;         // floats from X[c] to X[c + 1]
    int quads;          // of four numbers in an X[c]
    Divisor by_n_in, by_n_out, by_groups_in, by_groups_out, by_rank, by_quads;
    Folded folded;
    bool dense, mixed;  // a plain bottleneck; a weighted sum of all adapters
    Factor left, right2, bias2;
    Array rule, right, bias, rule2, left2;  // of all adapters
    bool shared_rule, shared_rule2;
    Array mix;          // [group][adapter]
    float scale;        // of right2 and bias2
    Activation activation;
    Tiling tiling;

    // The floats of each small factor of one adapter, in the order rule, right, bias, rule2, left2.
    COMPACTER_BOTH int rule_size() const { return middle.terms * n_in * n_out; }
    COMPACTER_BOTH int inner_size() const { return middle.m * middle.inner; }
    COMPACTER_BOTH int bias_size() const { return dense ? middle.m : middle.inner * n_in; }
    COMPACTER_BOTH int inner() const { return slots * middle.inner; }
};

// The parameters of an adapter, or of all that are mixed, as shared memory will have them: the small factors, then both wide
// ones in slabs of columns (fragments.h). family_images.cu makes them once, and every block copies them.
struct Images {
    const unsigned char* first;
    int64_t bytes;                 // of an image
    int left, right2;              // where the slabs begin in it
    int left_slab, right2_slab;    // bytes of a slab
    int small;                     // bytes of the small factors
};

// A wide factor in shared memory: all of it, or two slabs, of which one is copied while the other is used. Then both factors
// have the same place. `rows` is `terms` rounded up to a multiple of eight; those that do not exist are zeros.
struct Slab {
    int at, segments, terms, rows, parts;
    bool whole;
};

// The matrices of both projections and the bias in fp32, or the sums of their gradients, all in fp32.
struct FoldedPlaces {
    int first, second, bias;
};

// Where a kernel has what it shares, as offsets.
struct FamilyPlaces {
    int ids, mix;           // [token], [slot][token]
    Slab left, right2;
    int small;              // where the small factors of the first slot begin: these,
    SharedFactors factors;
    FoldedPlaces folded;    // or these
    int factors_bytes;      // of a slot
    Images images;
    int clear, clear_end;   // what must be 0 at first
};

// The parts of t2, b2 and the folded matrices in a forward: for x in bf16 they are rounded once, as the output is.
template <class T>
constexpr int forward_right_parts = T::parts == 1 ? 1 : T::factor_parts;

// The architecture that this is compiled for.
#ifdef __CUDA_ARCH__
constexpr int compiled_for = __CUDA_ARCH__ / 10;
#else
constexpr int compiled_for = 90;
#endif

// The blocks of a multiprocessor, as the registers allow. From sm_100 on the compiler takes more than half of them.
COMPACTER_BOTH constexpr int blocks_of_forward(int capability) { return capability < 100 ? 2 : 1; }

struct FamilyForward {
    Family family;
    const void *x, *residual;
    void* out;
    FamilyPlaces places;
    int z, v, h;
    int v_parts, part_stride;  // V2 as [part][c][row] in bf16
};

// What a backward keeps of each tile for the gradients of the wide factors: V2 or dZ as [part][c][row] in bf16.
struct Kept {
    uint16_t* first;  // or null
    int stride;       // numbers from one c to the next
    int part;         // from one part to the next
    int64_t tile;     // from one tile to the next
};

// A routed bank for the kernels that know the sizes of one adapter of rank 1. Its groups of rows have whole tiles of 8 tokens.
struct Routed {
    Tiling tiling;
    int cube, width, bottleneck;  // n^3, k, d
    bool shared_rule, shared_rule2;
    int note;  // where shared memory has what a block is at
};
struct RoutedPairForward {
    PairForward f;  // with the parameters of the first adapter
    Routed routed;
};
struct RoutedBackward {
    Backward b;  // the same; block p writes the sums of adapter e into row p + e
    Routed routed;
    int programs;
};

// The rows of partial sums: program p writes those of adapter e into row p + e, since both grow along the tiles; or, if
// all adapters are mixed, into row p * adapters + e.
struct Partials {
    float* first;
    int64_t row;   // floats
    int programs;  // each has a contiguous range of the tiles

    COMPACTER_BOTH float* of(const Family& f, int program, int adapter) const {
        return first + row * (f.mixed ? int64_t{program} * f.tiling.adapters + adapter : int64_t{program} + adapter);
    }
    int64_t rows(bool mixed, int adapters) const { return mixed ? int64_t{programs} * adapters : int64_t{programs} + adapters - 1; }
};

// The first kernel of a backward: dx, the sums of the small factors, and for the second what it needs of each row.
// But for bf16 before sm_100, the compiler takes more registers than 16 warps have.
template <class T>
COMPACTER_BOTH constexpr int threads_of_rows(int capability) {
    return T::parts == 1 && capability < 100 ? 512 : 256;
}

struct FamilyBackward {
    Family family;
    const void *x, *grad_out;
    void* grad_x;          // or null
    bool residual_is_x;
    Kept v2, dz;
    float* grad_mix;       // [token][adapter], or null
    Partials partials;     // rule, right, bias, rule2, left2; `first` is null if none is wanted
    FamilyPlaces places;
    Numbers numbers;       // z2 has the place of v, and dv that of dz2
    SharedSums sums;       // of the first slot: these,
    FoldedPlaces folded_sums;  // or these
    int sums_begin, sums_bytes;  // of a slot
    int mixed_v2, of_bias;  // X: V2; [slot][row]: <g, b2>
    int of_mix;             // [block of 16 columns][slot][token]: <h, dh>
    int v2_parts, dz_parts, part_stride;
};

// The second kernel: ds1, dt2 and db2, as products over the rows of the tiles.
constexpr int most_terms_of_weights = 64;  // numbers c of a block
struct FamilyWeights {
    Family family;
    const void *x, *grad_out;
    Kept v2, dz;
    Partials partials;             // left, right2, bias2
    bool wants_left, wants_right;  // right2 or bias2
    int slab;                      // columns u of a block
    int left_terms, right_terms;   // numbers c of a block, a multiple of eight
    int slabs_in, slabs_out;       // blocks of a program
    int ids, rows, row_stride, parts, parts_bytes, part_stride;
    int stage_bytes;               // from one of two stages to the next
};

// The third: adds the partials of each adapter.
struct FamilyGradient {
    Array array;
    int size, begin;  // numbers of one adapter, where they begin in a row
    bool wide, shared;
};
struct FamilyReduce {
    Family family;
    Partials narrow, wide;
    FamilyGradient gradients[8];
    int count, columns;
    int groups;  // of the threads of a block
};
struct MixReduce {
    const float* tokens;  // [token][adapter]
    Array gradient;       // [group][adapter]
    int adapters, group;
};

struct FamilyImages {
    Family family;
    FamilyPlaces places;
    unsigned char* to;
    int pieces;  // of an image, a block each
};

struct FamilyTable {
    Tiling tiling;
    const int64_t* route;
    int* table;
    int groups, warps;
};

template <class T>
void family_forward_kernel(const FamilyForward& forward, const Launch& launch);
template <class T>
void family_backward_kernel(const FamilyBackward& backward, const Launch& launch);
template <class T>
void family_weights_kernel(const FamilyWeights& weights, const Launch& launch);
void routed_pair_forward_kernel(const RoutedPairForward& forward, const Launch& launch);
void routed_folded_backward_kernel(const RoutedBackward& backward, const Launch& launch);
void family_images_kernel(const FamilyImages& images, const Launch& launch);
void family_table_kernel(const FamilyTable& table, const Launch& launch);
void family_reduce_kernel(const FamilyReduce& reduce, const Launch& launch);
void mix_reduce_kernel(const MixReduce& reduce, const Launch& launch);

}  // namespace compacter::cuda

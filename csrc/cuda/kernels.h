// The arguments of the kernels, and the layout of their shared memory.
#pragma once

#include "element.h"
#include "runtime.h"
#include "sizes.h"

namespace compacter::cuda {

// The parameters of both operations. One projection has rule, left, right2, bias2, and inner = 0.
//     Z = x left, V = mix(rule, Z), out = V right2 + bias2
// Before out, an adapter also computes Z2 = act(V right + bias) left2, V = mix(rule2, Z2).
struct Factors {
    Array rule, left, right, bias, rule2, left2, right2, bias2;
    float scale;  // of right2 and bias2
    Activation activation;
};

// Allocates shared memory in multiples of 16 bytes.
struct Room {
    int bytes = 0;

    int take(int64_t wanted) {
        const int at = bytes;
        const int64_t end = at + (wanted + 15) / 16 * 16;
        bytes = end > (1 << 30) ? 1 << 30 : static_cast<int>(end);  // a size that no device has
        return at;
    }
    int floats(int64_t count) { return take(count * 4); }
};

// The small factors in shared memory, in fp32, as offsets in bytes.
struct SharedFactors {
    int rule, rule2;   // [i][p][q], rule_stride floats from one i to the next
    int right, left2;  // [c][v], inner_stride floats from one c to the next
    int bias;          // [v][q]

    SharedFactors() = default;
    SharedFactors(const Sizes& s, Room& room)
        : rule(room.floats(s.terms * s.rule_stride)),
          rule2(room.floats(s.inner ? s.terms * s.rule_stride : 0)),
          right(room.floats(s.m * s.inner_stride)),
          left2(room.floats(s.m * s.inner_stride)),
          bias(room.floats(s.terms ? s.inner * s.n : s.m)) {}
};

// The sums over tokens of the gradients of the small factors, in shared memory, as offsets: each as its parameter.
struct SharedSums {
    int rule, rule2, right, left2, bias;
};

// The numbers of a tile between the projections in a backward, as offsets.
struct Numbers {
    int z, dv2, v, dz2, z2, dv, h, dy;
};

struct Forward {
    Sizes sizes;
    Factors factors;
    const void *x, *residual;
    void* out;
    int64_t tokens;

    SharedFactors shared;
    int left, right2;            // the wide factors (fragments.h); the rows of bias2 follow right2
    int scratch, scratch_bytes;  // a warp's z, v and h
    int z, v, h;                 // their offsets in it
};

// The sizes of an adapter of rank 1 whose tiles are pairs of chunks (pairs.h), for x in bf16.
struct PairSizes {
    int n, width, in;       // phm_dim, k, k / n
    int bottleneck, inner;  // d, d / n
    int group, log_shares;  // warps of a group, of which 2^log_shares share the columns of the same chunks
    int row;                // bytes of a token in shared memory, so that eight tokens are in different banks
    Divisor by_inner, by_in;

    COMPACTER_BOTH int steps() const { return (bottleneck + 15) / 16; }  // of 16 numbers of the bottleneck
    COMPACTER_BOTH int cube() const { return n * n * n; }
    COMPACTER_BOTH int shares() const { return 1 << log_shares; }
    COMPACTER_BOTH int tile_bytes() const { return 8 * row; }
};

// The kernels of the backward. All but the general one are for bf16 and sizes that are known: those of shapes.h,
// sides.h and wide.h.
enum class BackwardKernel { general, folded, sides, wide };

struct Backward {
    Sizes sizes;
    Factors factors;
    const void *x, *grad_out;
    void* grad_x;
    bool residual_is_x;
    int64_t tokens;

    float* partials;                                               // one row for each block
    int64_t row;                                                   // floats of a row
    int rule, left, right, bias, rule2, left2, right2, bias2;      // offsets of the gradients in a row
    bool has_bias2;
    BackwardKernel kernel;
    int stages;
    int block_tokens, longer_blocks;           // of the folded one: the tokens of a block, and how many blocks have one more

    SharedFactors shared;
    int left_factor, right2_factor;            // the wide factors (fragments.h)
    int left_sums, right_sums;                 // accumulators of the wide gradients, in the matrix instructions' layout
    SharedSums sums;
    int tile, tile_bytes;                      // a tile is rows of x, then rows of g
    int x_stride, g_stride;                    // bytes of a row
    int splits;                                // shares of the columns, for each of which there are z and dv2
    Numbers numbers;
    int v_parts, dz_parts, part_stride;        // [part][c][row] in bf16, part_stride numbers for each c
};

// Sums the rows of partials in a fixed order and writes the gradients, each one segment of a row.
struct Reduce {
    const float* partials;
    int64_t row;
    int rows;
    int count;
    Array gradient[8];
    int begin[9];  // the starts of the segments; begin[count] is the end of the row
};

struct PairForward {
    PairSizes sizes;
    Factors factors;
    const void *x, *residual;
    void* out;
    int64_t tokens;

    int left, right2, c1, c2;      // the weights as right operands of matrix products
    int bias;                      // b1 in fp32
    int exchange, exchange_bytes;  // what the warps of a group exchange
    int ring;                      // [stage][group], of two stages
    int raw;                       // all parameters in fp32, at first, where the second stage will be
};

// forward.cu has the sizes that occur most in bf16, so the general forward needs no instances for them.
template <class T>
constexpr bool known_forward = !std::is_same_v<T, bf16>;

// T is the dtype of x: f32, bf16 or f16. The sizes select the instance.
template <class T>
void forward_kernel(const Forward& forward, const Launch& launch);
void pair_forward_kernel(const PairForward& forward, const Launch& launch);
template <class T>
void backward_kernel(const Backward& backward, const Launch& launch);
void folded_backward_kernel(const Backward& backward, const Launch& launch);
void sides_backward_kernel(const Backward& backward, const Launch& launch);
void wide_backward_kernel(const Backward& backward, const Launch& launch);
void reduce_kernel(const Reduce& reduce, const Launch& launch);

constexpr int reduce_columns = 32, reduce_threads = 512;  // of a block

}  // namespace compacter::cuda

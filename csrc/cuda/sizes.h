// The sizes of one problem for the kernels, computed on the host for each launch.
//
// The row x of a token is n chunks. A tile is tokens * n rows of a chunk, a multiple of 16. Between
// the projections a token is numbers X[c][p], c = (i, rho) < m = n * rank, p < n: see middle.h.
#pragma once

#include "launch.h"

#ifdef COMPACTER_CUDA_ON_CPU
#define COMPACTER_BOTH inline
#else
#define COMPACTER_BOTH __host__ __device__ __forceinline__
#endif

namespace compacter::cuda {

constexpr int segment = 32;  // columns that a warp loads at once, eight for each of four lanes

COMPACTER_BOTH constexpr int round_up(int count, int step) { return (count + step - 1) / step * step; }
COMPACTER_BOTH constexpr int segments(int width) { return (width + segment - 1) / segment; }
COMPACTER_BOTH constexpr int eights(int count) { return (count + 7) / 8; }

// Division by a number unknown to the compiler, exact if count * divisor < 2^32.
struct Divisor {
    uint32_t divisor = 1, inverse = 0;

    Divisor() = default;
    explicit Divisor(int by) : divisor(by), inverse(static_cast<uint32_t>(((uint64_t{1} << 32) + by - 1) / by)) {}

    COMPACTER_BOTH int quotient(int count) const {
        if (divisor == 1) return count;
        return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(count)) * inverse >> 32);
    }
};

struct Sizes {
    int n, rank, m;
    int in, inner, out;  // widths of the chunks of x, of the bottleneck (0 without one), of the output
    int blocks;          // blocks of the n numbers X[c]: four at once, or one if four do not divide n
    int rule_stride;     // floats from one matrix of a rule to the next, in shared memory
    int inner_stride;    // floats from one inner factor to the next
    int tokens;          // tokens of a tile
    Divisor by_n, by_m, by_blocks, by_inner;
    bool in_vectors, out_vectors;  // whether rows of x, of the output are moved in steps of 16 bytes
    short terms;                   // matrices of a rule, m / rank

    COMPACTER_BOTH int rows() const { return tokens * n; }
    COMPACTER_BOTH int numbers() const { return tokens * m * n; }       // X of a tile
    COMPACTER_BOTH int inner_numbers() const { return tokens * inner * n; }
};

// The sizes that an instance of a kernel knows: N and M, or 0, and Q numbers X[c][p] at once.
template <int N, int M, int Q>
struct Known {
    static constexpr bool general = N == 0;
    static constexpr int quad = Q;
    static constexpr int most_columns = M ? eights(M) : 8;     // groups of eight c
    static constexpr int most_steps = M ? eights(M + N) : 10;  // the same with the rows of the bias

    COMPACTER_BOTH static int n(const Sizes& s) { return N ? N : s.n; }
    COMPACTER_BOTH static int m(const Sizes& s) { return M ? M : s.m; }
    COMPACTER_BOTH static int terms(const Sizes& s) { return N ? N : s.terms; }
    COMPACTER_BOTH static int rank(const Sizes& s) { return N ? M / N : s.rank; }
    COMPACTER_BOTH static int blocks(const Sizes& s) { return N ? N / Q : s.blocks; }
    COMPACTER_BOTH static int by_n(const Sizes& s, int count) { return N ? count / (N ? N : 1) : s.by_n.quotient(count); }
    COMPACTER_BOTH static int by_m(const Sizes& s, int count) { return M ? count / (M ? M : 1) : s.by_m.quotient(count); }
    COMPACTER_BOTH static int by_blocks(const Sizes& s, int count) {
        return N ? count / (N ? N / Q : 1) : s.by_blocks.quotient(count);
    }
};

// Whether these are the sizes of the shape S, an adapter of rank 1 that a kernel of the backward knows.
template <class S>
bool are_of(const Sizes& s) {
    return s.n == S::n && s.rank == 1 && s.in == S::chunk && s.out == S::chunk && s.inner == S::inner;
}

// Calls body with the compiled instance for these sizes. WithKnown: there are instances that know n.
template <bool WithKnown = true, class Body>
auto with_instance(const Sizes& s, const Body& body) {
    if constexpr (WithKnown) {
        if (s.n == 4 && s.m == 4) return body(Known<4, 4, 4>{});
        if (s.n == 8 && s.m == 8) return body(Known<8, 8, 4>{});
        if (s.n == 12 && s.m == 12) return body(Known<12, 12, 4>{});
    }
    if (s.n % 4 == 0) return body(Known<0, 0, 4>{});
    return body(Known<0, 0, 1>{});
}

}  // namespace compacter::cuda

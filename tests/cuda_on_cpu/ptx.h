// The names of csrc/cuda/ptx.h with bodies in C++, after the register layouts of the PTX manual ("Warp-level matrix
// instructions"): lane l is (g, t) = (l / 4, l % 4).
#pragma once

#include "collectives.h"

#define COMPACTER_DEVICE inline

namespace cuda_on_cpu {

inline int conflicts = 0;  // turns that ldmatrix has taken beyond one for each 8 x 8 matrix

inline unsigned char* in_shared(const Place& at, const void* p) {
    const auto* byte = static_cast<const unsigned char*>(p);
    if (byte < shared || byte + 16 > shared + shared_bytes) fail(at.text() + ": the address is outside shared memory");
    if ((byte - shared) % 16) fail(at.text() + ": the shared address is no multiple of 16");
    return shared + (byte - shared);
}
inline void check_global(const Place& at, const void* p, size_t alignment) {
    const auto* byte = static_cast<const unsigned char*>(p);
    if (byte >= shared && byte < shared + sizeof shared) fail(at.text() + ": the address is in shared memory");
    if (reinterpret_cast<uintptr_t>(p) % alignment) fail(at.text() + ": the address is misaligned");
}

inline float from_bf16(uint32_t pair, int half) { return __uint_as_float(half ? pair & 0xffff0000 : pair << 16); }
inline uint32_t to_bf16(float value) {
    const uint32_t bits = __float_as_uint(value);
    return isnan(value) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t to_f16(float value) {
    const float size = fabsf(value);
    const uint32_t sign = __float_as_uint(value) >> 16 & 0x8000, bits = __float_as_uint(size);
    if (isnan(value)) return 0x7fff;
    if (size >= 65520.f) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | static_cast<uint32_t>(nearbyintf(size * 0x1p24f));  // subnormal
    return sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10));  // to nearest even; 112: between the biases
}

// Tensor cores truncate the sum of the products and of the number that they add it to.
inline float truncated(double value) {
    const float nearest = static_cast<float>(value);
    return fabs(nearest) > fabs(value) && !isinf(nearest) ? nextafterf(nearest, 0.f) : nearest;
}

template <int K>
void mma(const Place& at, float (&d)[4], const uint32_t* a, const uint32_t* b) {
    struct Part {
        float* d;
        const uint32_t *a, *b;
    } part{d, a, b};
    collective(at, whole_warp, true, part, [](Part* const (&parts)[warp_size]) {
        float left[16][K], right[K][8];
        for (int lane = 0; lane < warp_size; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int e = 0; e < K / 2; ++e)
                left[g + e / 2 % 2 * 8][2 * t + e % 2 + e / 4 * 8] = from_bf16(parts[lane]->a[e / 2], e % 2);
            for (int e = 0; e < K / 4; ++e)
                right[2 * t + e % 2 + e / 2 * 8][g] = from_bf16(parts[lane]->b[e / 2], e % 2);
        }
        for (int row = 0; row < 16; ++row) {
            double sums[8] = {};
            for (int k = 0; k < K; ++k)
                for (int column = 0; column < 8; ++column) sums[column] += double{left[row][k]} * right[k][column];
            for (int column = 0; column < 8; ++column) {
                float& d = parts[row % 8 * 4 + column / 2]->d[row / 8 * 2 + column % 2];
                d = truncated(d + sums[column]);
            }
        }
    });
}

template <bool Transposed>
void ldmatrix(const Place& at, uint32_t (&r)[4], const void* row) {
    struct Part {
        uint32_t* r;
        const unsigned char* row;
    } part{r, in_shared(at, row)};
    collective(at, whole_warp, true, part, [&at](Part* const (&parts)[warp_size]) {
        for (int j = 0; j < 4; ++j) {
            uint16_t matrix[8][8];
            int turns = 0, turns_of_banks[8] = {};  // four banks hold a row; the same row twice takes one turn
            for (int i = 0; i < 8; ++i) {
                const unsigned char* row = parts[8 * j + i]->row;
                touch(*block.fibres[self->index - self->lane + 8 * j + i], at, row, 16, false);
                memcpy(matrix[i], row, 16);
                bool again = false;
                for (int before = 0; before < i; ++before) again |= parts[8 * j + before]->row == row;
                if (!again) turns = std::max(turns, ++turns_of_banks[(row - shared) / 16 % 8]);
            }
            conflicts += turns - 1;
            for (int lane = 0; lane < warp_size; ++lane) {
                const int g = lane / 4, t = lane % 4;
                const uint32_t low = Transposed ? matrix[2 * t][g] : matrix[g][2 * t];
                const uint32_t high = Transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
                parts[lane]->r[j] = low | high << 16;
            }
        }
    });
}

template <bool Transposed>
void stmatrix(const Place& at, void* row, const uint32_t (&r)[4]) {
    struct Part {
        const uint32_t* r;
        unsigned char* row;
    } part{r, in_shared(at, row)};
    collective(at, whole_warp, true, part, [&at](Part* const (&parts)[warp_size]) {
        for (int j = 0; j < 4; ++j)
            for (int i = 0; i < 8; ++i) {
                unsigned char* row = parts[8 * j + i]->row;
                touch(*block.fibres[self->index - self->lane + 8 * j + i], at, row, 16, true);
                for (int k = 0; k < 8; ++k) {  // a lane has columns 2t and 2t + 1 of row g
                    const int g = Transposed ? k : i, column = Transposed ? i : k;
                    const auto number = static_cast<uint16_t>(parts[g * 4 + column / 2]->r[j] >> column % 2 * 16);
                    memcpy(row + 2 * k, &number, 2);
                }
            }
    });
}

inline uint32_t movmatrix(const Place& at, uint32_t pair) {
    struct Part {
        uint32_t in, out;
    } part{pair, 0};
    collective(at, whole_warp, true, part, [](Part* const (&parts)[warp_size]) {
        const auto number = [&](int row, int column) { return parts[row * 4 + column / 2]->in >> column % 2 * 16 & 0xffff; };
        for (int lane = 0; lane < warp_size; ++lane)
            parts[lane]->out = number(lane % 4 * 2, lane / 4) | number(lane % 4 * 2 + 1, lane / 4) << 16;
    });
    return part.out;
}

}  // namespace cuda_on_cpu

namespace compacter::cuda {

using cuda_on_cpu::here;
using cuda_on_cpu::Place;

inline unsigned char* shared_memory() {
    unsigned char* memory = cuda_on_cpu::shared;
    asm("" : "+r"(memory));  // or AddressSanitizer takes what is inside the largest possible array to be right
    return memory;
}

inline uint32_t pack_bf16(float low, float high) {
    return cuda_on_cpu::to_bf16(low) | cuda_on_cpu::to_bf16(high) << 16;
}
inline uint32_t pack_f16(float low, float high) { return cuda_on_cpu::to_f16(low) | cuda_on_cpu::to_f16(high) << 16; }
inline float reciprocal(float x) { return 1.f / x; }
inline float from_f16(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, size = (bits & 0x7fffu) << 13;
    if ((bits & 0x7c00) == 0x7c00) return __uint_as_float(sign | 0x7f800000 | size);
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(size) * 0x1p112f));
}

inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place at = here("mma.m16n8k16")) {
    cuda_on_cpu::mma<16>(at, d, a, b);
}
inline void mma_16x8x8(float (&d)[4], const uint32_t (&a)[2], uint32_t b, Place at = here("mma.m16n8k8")) {
    cuda_on_cpu::mma<8>(at, d, a, &b);
}
inline void load_matrices(uint32_t (&r)[4], const void* row, Place at = here("ldmatrix")) {
    cuda_on_cpu::ldmatrix<false>(at, r, row);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, Place at = here("ldmatrix.trans")) {
    cuda_on_cpu::ldmatrix<true>(at, r, row);
}

inline void store_matrices(void* row, const uint32_t (&r)[4], Place at = here("stmatrix")) {
    cuda_on_cpu::stmatrix<false>(at, row, r);
}
inline void store_matrices_transposed(void* row, const uint32_t (&r)[4], Place at = here("stmatrix.trans")) {
    cuda_on_cpu::stmatrix<true>(at, row, r);
}
inline uint32_t transpose_matrix(uint32_t pair, Place at = here("movmatrix")) { return cuda_on_cpu::movmatrix(at, pair); }
inline uint32_t lanes_with(int key, Place at = here("match.any")) {
    struct Part {
        int key;
        uint32_t mask;
    } part{key, 0};
    cuda_on_cpu::collective(at, cuda_on_cpu::whole_warp, true, part, [](Part* const (&parts)[cuda_on_cpu::warp_size]) {
        for (Part* part : parts)
            for (int lane = 0; lane < cuda_on_cpu::warp_size; ++lane)
                part->mask |= static_cast<uint32_t>(parts[lane]->key == part->key) << lane;
    });
    return part.mask;
}
inline int bits_of(uint32_t mask) { return __builtin_popcount(mask); }
inline int lane_anew() { return static_cast<int>(threadIdx.x % 32); }
inline int thread_anew() { return static_cast<int>(threadIdx.x); }
inline int threads_anew() { return static_cast<int>(blockDim.x); }
inline int block_anew() { return static_cast<int>(blockIdx.x); }
inline void sync_threads(int barrier, int threads, Place at = here("bar.sync")) {
    cuda_on_cpu::named_barrier(at, barrier, threads);
}

// The hardware reads and writes at any time between here and the wait: nobody may look, nobody may write.
inline void copy_async(void* shared, const void* global, bool real, Place at = here("cp.async")) {
    cuda_on_cpu::Machinery guard;
    unsigned char* to = cuda_on_cpu::in_shared(at, shared);
    cuda_on_cpu::check_global(at, global, 16);
    cuda_on_cpu::touch(*cuda_on_cpu::self, at, to, 16, true);
    cuda_on_cpu::Copy copy{to, {}, cuda_on_cpu::self->group};
    if (real) {
        cuda_on_cpu::touch(*cuda_on_cpu::self, at, global, 16, false);
        memcpy(copy.bytes, global, 16);
    }
    memset(to, 0xff, 16);
    cuda_on_cpu::self->copies.push_back(copy);
}
inline void commit_copies() {
    cuda_on_cpu::Machinery guard;
    ++cuda_on_cpu::self->group;
}
template <int Left>
void wait_copies(Place at = here("cp.async.wait_group")) {
    cuda_on_cpu::Machinery guard;
    auto& copies = cuda_on_cpu::self->copies;
    auto copy = copies.begin();
    for (; copy != copies.end() && copy->group + Left < cuda_on_cpu::self->group; ++copy) {
        for (int i = 0; i < 16; ++i)
            if (copy->to[i] != 0xff) cuda_on_cpu::fail(at.text() + ": what was under way here has been written over");
        cuda_on_cpu::touch(*cuda_on_cpu::self, at, copy->to, 16, true);
        memcpy(copy->to, copy->bytes, 16);
    }
    copies.erase(copies.begin(), copy);
}

inline void store_global(uint4* p, uint4 value, Place at = here("store_global")) {
    cuda_on_cpu::check_global(at, p, 16);
    *p = value;
}
inline uint4 load_constant(const uint4* p, Place at = here("load_constant")) {
    cuda_on_cpu::check_global(at, p, 16);
    return *p;
}

inline void prefetch(const void*) {}
inline double double_of(uint32_t high, uint32_t low) {
    const uint64_t bits = uint64_t{high} << 32 | low;
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline void let_next_kernel_start() {}  // the next one starts when this one has ended, here
inline void wait_for_previous_kernel() {
    cuda_on_cpu::Machinery guard;
    cuda_on_cpu::self->waited = cuda_on_cpu::any_waited = true;
}

}  // namespace compacter::cuda

template <class T>
T __ldg(const T* p, cuda_on_cpu::Place at = cuda_on_cpu::here("__ldg")) {
    cuda_on_cpu::check_global(at, p, alignof(T));
    return *p;
}
template <class T>
T __ldcs(const T* p, cuda_on_cpu::Place at = cuda_on_cpu::here("__ldcs")) {
    cuda_on_cpu::check_global(at, p, alignof(T));
    return *p;
}
template <class T>
void __stcs(T* p, T value, cuda_on_cpu::Place at = cuda_on_cpu::here("__stcs")) {
    cuda_on_cpu::check_global(at, p, alignof(T));
    *p = value;
}

// What the execution on the CPU must get right. With an argument: the fault of that name (faults.cpp).
#include <array>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "../../csrc/cuda/ptx.h"
#include "../../csrc/cuda/runtime.h"
#include "check.h"

namespace compacter::cuda {
namespace {

__global__ void __launch_bounds__(256) block_sums(const float* __restrict__ in, float* out) {
    auto* parts = reinterpret_cast<float*>(shared_memory());
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sum = __ldg(in + blockIdx.x * blockDim.x + threadIdx.x);
#pragma unroll
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    if (lane == 0) parts[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        float all = lane < blockDim.x / 32 ? parts[lane] : 0;
        for (int step = 16; step; step /= 2) all += __shfl_down_sync(0xffffffff, all, step);
        if (lane == 0) parts[blockDim.x / 32] = all;
    }
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = parts[blockDim.x / 32];
}

void sums_by_shuffles() {
    std::vector<float> in(512), out(512);
    std::iota(in.begin(), in.end(), 0.f);
    launch(block_sums, {2, 256, 9 * 4, nullptr, false}, in.data(), out.data());
    for (int i = 0; i < 512; ++i) check(out[i] == (i < 256 ? 32640 : 98176), "a block's sum");
}

__global__ void halves_of_a_warp(int* out) {
    const int lane = static_cast<int>(threadIdx.x);
    if (lane < 16) {
        out[lane] = __shfl_sync(0x0000ffff, lane, 3);
    } else {
        out[lane] = __shfl_sync(0xffff0000, lane, 20);
        __syncwarp(0xffff0000);
    }
    out[lane] += 100 * __shfl_up_sync(0xffffffff, lane, 1, 8);
    if (lane >= 30) return;  // who has left is not waited for
    __syncthreads();
    if (lane == 0) out[31] += __shfl_sync(0x00000003, 0, 1), out[30] = 0;
    if (lane == 1) __shfl_sync(0x00000003, 1000000, 0);
}

void lanes_apart() {
    std::array<int, 32> out{};
    launch(halves_of_a_warp, {1, 32, 0, nullptr, false}, out.data());
    check(out[0] == 3 && out[1] == 3 && out[15] == 1403 && out[16] == 1620 && out[17] == 1620, "two shuffles at once");
    check(out[31] == 1003020 && out[30] == 0, "a barrier without the lanes that have left");
}

__global__ void poisoned(unsigned* out, const uint4* in, bool wait) {
    auto* words = reinterpret_cast<unsigned*>(shared_memory());
    out[3 * blockIdx.x] = words[threadIdx.x];
    words[threadIdx.x] = 7;
    copy_async(words + 4 * threadIdx.x, in, true);
    commit_copies();
    copy_async(words + 4 * (threadIdx.x + blockDim.x), in, false);
    commit_copies();
    if (wait) wait_copies<1>();
    out[3 * blockIdx.x + 1] = words[4 * threadIdx.x];
    if (wait) wait_copies<0>();
    out[3 * blockIdx.x + 2] = words[4 * (threadIdx.x + blockDim.x) + 3];
}

void poison_is_seen() {
    const uint4 in{11, 12, 13, 14};
    for (bool wait : {true, false}) {
        std::array<unsigned, 6> out{};
        launch(poisoned, {2, 1, 32, nullptr, false}, out.data(), &in, wait);
        for (int i = 0; i < 6; i += 3) {
            check(out[i] == 0xffffffff, "shared memory starts as ones");
            check(out[i + 1] == (wait ? 11 : 0xffffffff), "a copy is there after its wait and not before");
            check(out[i + 2] == (wait ? 0 : 0xffffffff), "a copy of nothing brings zeros");
        }
    }
    std::array<unsigned, 32> out{};
    launch(+[](unsigned* out) { if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffff, 1u, 20); },
           {1, 32, 0, nullptr, false}, out.data());
    check(out[3] == 0xffffffff, "a shuffle from a lane that takes no part");
}

constexpr int values = 16 * 16;

// d += a b by load_matrices and mma: a (16 x K) row by row, b (K x 8) row by row, both bfloat16.
template <int K>
__global__ void product(const uint16_t* a, const uint16_t* b, float* d) {
    auto* a_rows = reinterpret_cast<uint16_t*>(shared_memory());
    auto* b_rows = a_rows + values;
    const unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
    for (unsigned i = lane; i < values; i += 32) a_rows[i] = a[i], b_rows[i] = i < K * 8 ? b[i] : 0;
    __syncwarp();
    uint32_t left[4], right[4];
    // matrices of a: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15; of b: k 0-7, then k 8-15 (twice)
    load_matrices(left, a_rows + (lane % 16) * K + lane / 16 * 8 % K);
    load_matrices_transposed(right, b_rows + lane % K * 8);
    float sums[4] = {1, 2, 3, 4};
    if constexpr (K == 16) mma_16x8x16(sums, left, {right[0], right[1]});
    else mma_16x8x8(sums, {left[0], left[1]}, right[0]);
    for (int e = 0; e < 4; ++e) d[(g + e / 2 * 8) * 8 + 2 * t + e % 2] = sums[e];
}

template <int K>
void products() {
    std::vector<uint16_t> a(values), b(values);
    std::vector<float> d(16 * 8);
    for (int i = 0; i < values; ++i) {
        a[i] = static_cast<uint16_t>(pack_bf16(static_cast<float>(i * 7 % 23 - 11), 0));
        b[i] = static_cast<uint16_t>(pack_bf16(static_cast<float>(i * 5 % 19 - 9), 0));
    }
    launch(product<K>, {1, 32, 4 * values, nullptr, false}, a.data(), b.data(), d.data());
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 8; ++column) {
            float sum = static_cast<float>(1 + row / 8 * 2 + column % 2);
            for (int k = 0; k < K; ++k) sum += static_cast<float>((row * K + k) * 7 % 23 - 11) *
                                               static_cast<float>((k * 8 + column) * 5 % 19 - 9);
            check(d[row * 8 + column] == sum, "mma of what ldmatrix brings");
        }
}

// Each matrix goes to another place, and the two groups of two warps meet at barriers of their own.
__global__ void matrices_of_groups(int* out) {
    auto* rows = reinterpret_cast<uint16_t*>(shared_memory());
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, barrier = 1 + warp / 2;
    for (int round = 0; round < 3; ++round) {
        for (unsigned i = lane; i < values; i += 32) rows[warp * values + i] = static_cast<uint16_t>(1000 * warp + i + round);
        __syncwarp();
        uint32_t r[4];
        load_matrices(r, rows + warp * values + lane * 8);
        __syncwarp();
        store_matrices(rows + warp * values + (lane + 8) % 32 * 8, r);
        sync_threads(static_cast<int>(barrier), 64);
        for (unsigned i = lane; i < values; i += 32) out[warp * values + i] = rows[(warp ^ 1) * values + i];
        sync_threads(static_cast<int>(barrier), 64);
    }
}

void groups_exchange_matrices() {
    std::vector<int> out(4 * values);
    launch(matrices_of_groups, {1, 128, 8 * values, nullptr, false}, out.data());
    for (int i = 0; i < 4 * values; ++i)
        check(out[i] == 1000 * (i / values ^ 1) + (i + values - 64) % values + 2, "a matrix of the other warp of the group");
}

void a_fragment_transposed() {
    std::array<uint32_t, 32> out{};
    launch(+[](uint32_t* out) {
        const unsigned lane = threadIdx.x, first = lane / 4 * 8 + lane % 4 * 2;  // row g, columns 2t and 2t + 1
        out[lane] = transpose_matrix(first | (first + 1) << 16);
    }, {1, 32, 0, nullptr, false}, out.data());
    for (uint32_t lane = 0; lane < 32; ++lane) {
        const uint32_t first = lane % 4 * 2 * 8 + lane / 4;
        check(out[lane] == (first | (first + 8) << 16), "rows 2t and 2t + 1 of column g");
    }
}

// Each warp meets the one before it, then the one behind it.
__global__ void one_after_another(int* out) {
    auto* sum = reinterpret_cast<int*>(shared_memory());
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    if (warp > 0) sync_threads(warp, 64);
    sum[lane] = warp > 0 ? 2 * sum[lane] + warp : lane;
    if (warp < 3) sync_threads(warp + 1, 64);
    else out[lane] = sum[lane];
}

void warps_in_turn() {
    std::array<int, 32> out{};
    launch(one_after_another, {1, 128, 128, nullptr, false}, out.data());
    for (int lane = 0; lane < 32; ++lane) check(out[lane] == 8 * lane + 11, "what four warps do one after another");
}

// d + a b with a b = 3/4 of the distance from d = 1 to the next float, for both signs
__global__ void truncating(float* d) {
    const bool first = threadIdx.x % 4 == 0;
    const uint32_t a = first ? pack_bf16(0x1.8p-12f, 0) : 0, b = first ? pack_bf16(0x1p-12f, 0) : 0;
    float above[4] = {1, 1, 1, 1}, below[4] = {-1, -1, -1, -1};
    mma_16x8x8(above, {a, a}, b);
    mma_16x8x8(below, {a ^ 0x8000, a ^ 0x8000}, b);
    if (threadIdx.x == 0) d[0] = above[0], d[1] = below[0];
}

void sums_are_truncated() {
    float d[2];
    launch(truncating, {1, 32, 0, nullptr, false}, d);
    check(1 + 0x1.8p-24f > 1 && d[0] == 1 && d[1] == -1, "mma truncates");
}

void conflicts_are_counted() {
    cuda_on_cpu_conflicts();
    for (int stride : {16, 32, 128, 144, 0}) {
        launch(+[](int stride) {
            uint32_t r[4];
            load_matrices(r, shared_memory() + threadIdx.x * static_cast<unsigned>(stride));
        }, {1, 32, 32 * 144, nullptr, false}, stride);
        check(cuda_on_cpu_conflicts() == (stride == 32 ? 4 : stride == 128 ? 28 : 0), "ldmatrix's bank conflicts");
    }
}

void halves() {
    for (unsigned bits = 0; bits < 0x10000; ++bits) {
        const float value = from_f16(static_cast<uint16_t>(bits));
        if (isnan(value)) check((bits & 0x7fff) > 0x7c00 && pack_f16(value, 0) == 0x7fff, "a half that is no number");
        else check(pack_f16(0, value) == bits << 16, "a half there and back");
    }
    check(from_f16(0x3c01) == 1.0009765625f && from_f16(0x0001) == 0x1p-24f && isinf(from_f16(0xfc00)), "halves");
    check(pack_f16(2049.f, 2051.f) == 0x68026800 && pack_f16(65519.f, -65520.f) == 0xfc007bff, "rounding to half");
    check(pack_f16(0x1p-25f, 0x1.8p-24f) == 0x00020000 && pack_f16(0x1.ffep-15f, -0.f) == 0x80000400, "subnormal halves");
    check(pack_bf16(0x1.01p0f, 0x1.03p0f) == 0x3f823f80 && pack_bf16(INFINITY, -NAN) == 0x7fff7f80, "bfloat16");
}

}  // namespace

void all_results() {
    for (unsigned order : {0u, 1u, 2u, 3u, 4u}) {
        cuda_on_cpu_order(order);
        sums_by_shuffles();
        lanes_apart();
        poison_is_seen();
        products<16>();
        products<8>();
        groups_exchange_matrices();
        a_fragment_transposed();
        warps_in_turn();
        sums_are_truncated();
        conflicts_are_counted();
    }
    halves();
}

}  // namespace compacter::cuda

int main(int count, char** arguments) {
    if (count == 1) compacter::cuda::all_results();
    else compacter::cuda::fault(arguments[1]);
}

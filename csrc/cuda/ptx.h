// The instructions that C++ cannot express, one function each. Tests on the CPU replace this file
// (tests/cuda_on_cpu), so that no other file in csrc/cuda may contain assembly.
#pragma once

#ifndef COMPACTER_CUDA_ON_CPU

#include <cstdint>

#define COMPACTER_DEVICE __device__ __forceinline__

namespace compacter::cuda {

// The dynamic shared memory of the block, aligned to 128 bytes, and the only shared memory.
COMPACTER_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char compacter_shared[];
    return compacter_shared;
}

COMPACTER_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Two floats as bf16, rounded to nearest even, with `low` in the lower half as in memory.
COMPACTER_DEVICE uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Two floats as f16, rounded to nearest even.
COMPACTER_DEVICE uint32_t pack_f16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

COMPACTER_DEVICE float from_f16(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// 1 / x but for the last bit, for x from 1 to 2.
COMPACTER_DEVICE float reciprocal(float x) {
    float value;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

// A double from the halves of its bits.
COMPACTER_DEVICE double double_of(uint32_t high, uint32_t low) {
    return __hiloint2double(static_cast<int>(high), static_cast<int>(low));
}

// d += a b in bf16, 16 x 8 x 16. Lane (g, t) = (lane / 4, lane % 4) holds, as pairs along k,
//   a[0]: row g, k 2t    a[1]: row g+8, k 2t    a[2]: row g, k 2t+8    a[3]: row g+8, k 2t+8
//   b[0]: k 2t, column g  b[1]: k 2t+8, column g  d[0..1]: row g, column 2t, 2t+1  d[2..3]: row g+8
COMPACTER_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b, 16 x 8 x 8:  a[0]: row g, k 2t  a[1]: row g+8, k 2t  b: k 2t, column g  d as above
COMPACTER_DEVICE void mma_16x8x8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Four 8 x 8 matrices of 16-bit numbers. Lane 8j+i points to row i of matrix j (16 aligned bytes).
// r[j] becomes row g, columns 2t and 2t+1 of matrix j; transposed: rows 2t and 2t+1 of column g.
COMPACTER_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
COMPACTER_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// A fragment of an 8 x 8 matrix, row g, columns 2t and 2t+1, becomes rows 2t and 2t+1 of column g.
COMPACTER_DEVICE uint32_t transpose_matrix(uint32_t pair) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
    return transposed;
}

// The inverse of load_matrices: lane 8j+i points to where row i of matrix j goes.
COMPACTER_DEVICE void store_matrices(void* row, const uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#else
    const uint32_t address = shared_address(row), lane = threadIdx.x % 32;
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t at = __shfl_sync(0xffffffff, address, 8 * j + lane / 4) + lane % 4 * 4;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(r[j]) : "memory");
    }
#endif
}

// The inverse of load_matrices_transposed.
COMPACTER_DEVICE void store_matrices_transposed(void* row, const uint32_t (&r)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address(row)), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#else
    store_matrices(row, {transpose_matrix(r[0]), transpose_matrix(r[1]), transpose_matrix(r[2]), transpose_matrix(r[3])});
#endif
}

// The lanes of the warp whose key is that of this one, as bits, and how many bits are set.
COMPACTER_DEVICE uint32_t lanes_with(int key) { return __match_any_sync(0xffffffff, key); }
COMPACTER_DEVICE int bits_of(uint32_t mask) { return __popc(mask); }

// The lane of this thread, read anew: the compiler computes what follows from it there, instead of keeping it in
// registers from an earlier place on.
COMPACTER_DEVICE int lane_anew() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    __builtin_assume(lane >= 0 && lane < 32);
    return lane;
}

// This thread, the threads of the block, and its number, read anew.
COMPACTER_DEVICE int thread_anew() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
COMPACTER_DEVICE int threads_anew() {
    int threads;
    asm volatile("mov.u32 %0, %%ntid.x;" : "=r"(threads));
    return threads;
}
COMPACTER_DEVICE int block_anew() {
    int block;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
    return block;
}

// Copies 16 aligned bytes, or zeros if not `real`, to shared memory, complete after wait_copies.
COMPACTER_DEVICE void copy_async(void* shared, const void* global, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(real ? 16 : 0)
                 : "memory");
}
// Closes this thread's group of copies; waits until at most `Left` of its groups are in flight.
COMPACTER_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Left>
COMPACTER_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// A barrier of `threads` threads, whole warps, which name the same barrier 1 to 15.
COMPACTER_DEVICE void sync_threads(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Prefetches the line of global memory at p into the L2.
COMPACTER_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// A store to global memory, which the caches keep as any other. The compiler cannot always tell that a
// pointer is global.
COMPACTER_DEVICE void store_global(uint4* p, uint4 value) { __stwb(p, value); }

// A load of data that is constant while the kernel runs.
COMPACTER_DEVICE uint4 load_constant(const uint4* p) { return __ldg(p); }

// Programmatic dependent launch (sm_90 on): the next kernel starts early, and waits in the second.
COMPACTER_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
COMPACTER_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace compacter::cuda

#endif

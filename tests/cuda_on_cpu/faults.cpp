// Kernels with one fault each, which selftest launches by name.
#include <functional>
#include <map>
#include <memory>

#include "../../csrc/cuda/ptx.h"
#include "../../csrc/cuda/runtime.h"
#include "check.h"

namespace compacter::cuda {
namespace {

unsigned* words() { return reinterpret_cast<unsigned*>(shared_memory()); }

// Read only when a fault is missed, so that the compiler keeps what a kernel computes.
unsigned sink[4096];
alignas(16) unsigned char source[64];

using Fault = std::function<void()>;

// A launch of a kernel without parameters that are of interest.
template <class Kernel>
Fault in(int threads, Kernel kernel, int shared_bytes = 1024, int blocks = 1) {
    return [=] { launch(+kernel, {blocks, threads, shared_bytes, nullptr, false}); };
}

const std::map<std::string, Fault> faults = {
    // lanes and threads that do not meet
    {"different instructions", in(32, [] {
        if (threadIdx.x < 16) __syncwarp();
        else __shfl_sync(0xffffffff, 1, 0);
    })},
    {"different mmas", in(32, [] {
        float d[4] = {};
        if (threadIdx.x < 16) mma_16x8x8(d, {0, 0}, 0);
        else mma_16x8x8(d, {0, 0}, 0);
    })},
    {"different barriers", in(64, [] {
        if (threadIdx.x < 32) __syncthreads();
        else __syncthreads();
    })},
    {"one lane has left", in(32, [] {
        if (threadIdx.x == 5) return;
        __syncwarp();
    })},
    {"not in its own mask", in(32, [] { __syncwarp(0x0000ffff); })},
    {"lanes that are not there", in(16, [] { __syncwarp(); })},
    {"barrier 16", in(32, [] { sync_threads(16, 32); })},
    {"half of a group", in(64, [] {
        if (threadIdx.x < 32) sync_threads(1, 64);
    })},
    {"half a warp at a barrier", in(64, [] {
        if (threadIdx.x < 48) __syncthreads();
        else __syncwarp();
    })},
    {"masks that differ", in(32, [] { __shfl_sync(threadIdx.x == 3 ? 0xffffffff : 0x7fffffff | 1u << threadIdx.x, 1, 0); })},

    // addresses
    {"misaligned ldmatrix", in(32, [] {
        uint32_t r[4];
        load_matrices(r, shared_memory() + 2 * threadIdx.x);
    })},
    {"ldmatrix beyond", in(32, [] {
        uint32_t r[4];
        load_matrices_transposed(r, shared_memory() + 32 * (threadIdx.x + 1));
    })},
    {"ldmatrix from global memory", in(32, [] {
        uint32_t r[4];
        load_matrices(r, source);
    })},
    {"misaligned copy", in(1, [] { copy_async(shared_memory(), source + 8, true); })},
    {"copy to global memory", in(1, [] { copy_async(source, source, true); })},
    {"copy from shared memory", in(1, [] { copy_async(shared_memory(), shared_memory(), true); })},
    {"copy written over", in(1, [] {
        copy_async(shared_memory(), source, true);
        commit_copies();
        words()[0] = 1;
        wait_copies<0>();
    })},
    {"write beyond", in(32, [] { words()[threadIdx.x + 1] = 1; }, 128)},

    // launches
    {"too many threads", in(1025, [] {})},
    {"no blocks", in(32, [] {}, 0, 0)},
    {"too much shared memory", in(32, [] {}, (227 << 10) + 1)},
    {"no wait", [] { launch(+[] {}, {1, 1, 0, nullptr, true}); }},

    // seen by AddressSanitizer
    {"crash: shared", in(64, [] {
        words()[threadIdx.x] = 1;
        __syncthreads();
        sink[threadIdx.x] = words()[threadIdx.x + 1];
    }, 256)},
    {"crash: last byte", in(1, [] { sink[0] = shared_memory()[101]; }, 101)},
    {"crash: global", [] {
        const std::unique_ptr<int[]> memory(new int[64]);
        launch(+[](int* p) {
            __syncthreads();
            p[threadIdx.x + 1] = 1;
        }, {1, 64, 0, nullptr, false}, memory.get());
    }},
    {"crash: copy", [] {
        const std::unique_ptr<unsigned char[]> memory(new unsigned char[24]);
        launch(+[](unsigned char* p) { copy_async(shared_memory(), p + 16, true); }, {1, 1, 16, nullptr, false}, memory.get());
    }},
    {"crash: local", in(32, [] {
        unsigned array[8];
        for (unsigned i = 0; i < 8; ++i) array[i] = i;
        __syncthreads();
        sink[0] = array[threadIdx.x];
    })},
    {"crash: misaligned", in(1, [] { sink[0] = reinterpret_cast<uint4*>(shared_memory() + 4 * (blockDim.x))->x; })},

    // seen by the race check
    {"race: no barrier", in(64, [] {
        words()[threadIdx.x] = threadIdx.x;
        sink[threadIdx.x] = words()[63 - threadIdx.x];
    })},
    {"race: __syncwarp is no barrier", in(64, [] {
        words()[threadIdx.x] = threadIdx.x;
        __syncwarp();
        sink[threadIdx.x] = words()[63 - threadIdx.x];
    })},
    {"race: a shuffle orders nothing", in(32, [] {
        words()[threadIdx.x] = threadIdx.x;
        __shfl_sync(0xffffffff, 1, 0);
        sink[threadIdx.x] = words()[31 - threadIdx.x];
    })},
    {"race: halves of a warp", in(32, [] {
        words()[threadIdx.x] = threadIdx.x;
        __syncwarp(threadIdx.x < 16 ? 0x0000ffff : 0xffff0000);
        sink[threadIdx.x] = words()[31 - threadIdx.x];
    })},
    {"race: read then written", in(64, [] {
        words()[threadIdx.x] = 0;
        __syncthreads();
        sink[threadIdx.x] = words()[5];
        __syncwarp();
        if (threadIdx.x == 5) words()[5] = 1;
    })},
    {"race: copies are waited for by each thread alone", in(64, [] {
        copy_async(shared_memory() + 16 * threadIdx.x, source, true);
        commit_copies();
        wait_copies<0>();
        sink[threadIdx.x] = words()[4 * (63 - threadIdx.x)];
    })},
    {"race: barriers of two groups", in(64, [] {
        if (threadIdx.x == 0) words()[0] = 1;
        sync_threads(1 + static_cast<int>(threadIdx.x / 32), 32);
        if (threadIdx.x == 32) sink[0] = words()[0];
    })},
    {"race: ldmatrix", in(64, [] {
        for (unsigned i = threadIdx.x; i < 256; i += 64) words()[i] = i;
        uint32_t r[4];
        load_matrices(r, shared_memory() + 16 * threadIdx.x);
        sink[threadIdx.x] = r[0];
    })},
    {"race: blocks", in(32, [] { sink[threadIdx.x + 16 * blockIdx.x] = 1; }, 0, 2)},
    {"race: launches", [] {
        launch(+[] { sink[threadIdx.x] = 1; }, {1, 32, 0, nullptr, false});
        launch(+[] {
            sink[100] = sink[0];
            wait_for_previous_kernel();
        }, {1, 1, 0, nullptr, true});
    }},

    // no faults
    {"none: barriers", in(64, [] {
        words()[threadIdx.x] = threadIdx.x;
        __syncthreads();
        const unsigned other = words()[63 - threadIdx.x];
        __syncthreads();
        words()[threadIdx.x] = other;
        __syncwarp();
        sink[threadIdx.x] = words()[threadIdx.x ^ 7];
        __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffff : 0xffff0000);
        words()[threadIdx.x] = 1;
        __syncwarp();
        if (threadIdx.x % 32 == 0) words()[threadIdx.x + 9] = 2;
    })},
    {"none: launches", [] {
        launch(+[] { sink[threadIdx.x] = 1; }, {1, 64, 0, nullptr, false});
        launch(+[] {
            const unsigned constant = sink[200];
            if (threadIdx.x == 0) wait_for_previous_kernel();
            __syncthreads();
            sink[threadIdx.x] += constant;
        }, {1, 64, 0, nullptr, true});
    }},
};

}  // namespace

void fault(const std::string& name) {
    for (unsigned order : {0u, 1u, 2u, 3u}) {
        cuda_on_cpu_order(order);
        try {
            faults.at(name)();
            puts("no fault");
        } catch (const std::runtime_error& error) {
            puts(error.what());
        }
    }
}

}  // namespace compacter::cuda

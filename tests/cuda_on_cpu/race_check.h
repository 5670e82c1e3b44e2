// Races on shared and global memory, whatever the order of the threads. Compiled with -fsanitize=thread and linked
// without, the library brings the compiler's calls before every load and store here instead of to ThreadSanitizer.
//
// Two threads may touch the same two bytes, one of them writing, only if a __syncthreads or named barriers come
// between, or a __syncwarp that names both lanes (shuffles, mma and ldmatrix order no memory); threads of different blocks
// never; and a kernel that overlaps its predecessor only after wait_for_previous_kernel. Copies by memcpy() are not seen.
#pragma once

#include "fibres.h"

#ifndef __SANITIZE_THREAD__

namespace cuda_on_cpu {
inline void touch(const Fibre&, const Place&, const void*, size_t, bool) {}
inline void join_lanes(Fibre* const (&)[warp_size]) {}
inline void start_race_check(bool) {}
inline void start_race_check_of_block() {}
}  // namespace cuda_on_cpu

#else

#include <dlfcn.h>

#include <unordered_map>

#define COMPACTER_NO_TSAN __attribute__((no_sanitize("thread"), noinline))

namespace cuda_on_cpu {

struct Access {
    unsigned launch = 0, block = 0;  // launch 0: no access yet
    int thread = 0;
    unsigned barriers = 0, passes = 0, epoch = 0;  // the block's, the warp's named ones, the lane's
    Place at;                        // or, of a plain load or store,
    const void* code = nullptr;
};

// The last write, the last read, the last by another lane of its warp, the last by another warp: if any read races with
// a later write, then one of these three does.
struct Cell {
    Access write, read, read_by_lane, read_by_warp;
};

inline std::vector<Cell> shared_cells;                      // two bytes each
inline std::unordered_map<uintptr_t, Cell> global_cells;
inline unsigned launches = 0;
inline bool overlapping = false;

// Some accesses of kernels that overlap this one would outlive their launch: they are kept as long as kernels overlap.
inline void start_race_check(bool overlaps) {
    ++launches;
    overlapping = overlaps;
    if (!overlaps) global_cells.clear();
}
inline void start_race_check_of_block() { shared_cells.assign(shared_bytes / 2 + 1, {}); }

// __syncwarp: whatever a lane has done comes before whatever the others do from now on.
inline void join_lanes(Fibre* const (&lanes)[warp_size]) {
    uint32_t joint[warp_size] = {};
    for (Fibre* fibre : lanes)
        if (fibre) {
            ++fibre->seen[fibre->lane];
            for (int lane = 0; lane < warp_size; ++lane) joint[lane] = std::max(joint[lane], fibre->seen[lane]);
        }
    for (Fibre* fibre : lanes)
        if (fibre) std::copy(std::begin(joint), std::end(joint), fibre->seen);
}

inline bool ordered(const Access& before, const Fibre& now) {
    if (!before.launch) return true;
    if (before.launch != launches) return now.waited || block.waited;
    if (before.block != blockIdx.x) return false;
    if (before.thread == now.index || before.barriers < block.barriers) return true;
    if (warp_of(now).seen[before.thread / warp_size] > before.passes) return true;
    return before.thread / warp_size == now.index / warp_size && now.seen[before.thread % warp_size] > before.epoch;
}

inline std::string place_of(const Access& access) {
    if (!access.code) return access.at.text();
    Dl_info library{};
    dladdr(access.code, &library);
    char text[512];
    snprintf(text, sizeof text, "addr2line -Cipe '%s' 0x%zx", library.dli_fname,
             static_cast<const char*>(access.code) - static_cast<const char*>(library.dli_fbase) - 1);
    std::string place;
    if (FILE* lines = popen(text, "r")) {
        while (fgets(text, sizeof text, lines)) place += text;
        pclose(lines);
    }
    while (!place.empty() && place.back() == '\n') place.pop_back();
    return place;
}

inline void record(Cell& cell, const Access& now, bool write, const Fibre& fibre) {
    const Access* other = ordered(cell.write, fibre) ? nullptr : &cell.write;
    if (write)
        for (const Access* read : {&cell.read, &cell.read_by_lane, &cell.read_by_warp})
            if (!ordered(*read, fibre)) other = read;
    if (other)
        fail("race: block " + std::to_string(other->block) + ", thread " + std::to_string(other->thread) +
             (other == &cell.write ? " writes" : " reads") + (other->launch == launches ? "" : " (in the launch before)") +
             " at " + place_of(*other) + ", thread " + std::to_string(now.thread) + (write ? " writes" : " reads") +
             " at " + place_of(now) + ", and nothing orders them");
    if (write) {
        cell.write = now;
        return;
    }
    if (cell.read.launch && cell.read.thread / warp_size != now.thread / warp_size) {
        cell.read_by_warp = cell.read;
        cell.read_by_lane = {};
    } else if (cell.read.thread != now.thread) {
        cell.read_by_lane = cell.read;
    }
    cell.read = now;
}

inline void touch(const Fibre& fibre, const Place& at, const void* p, size_t bytes, bool write,
                  const void* code = nullptr) {
    const auto* first = static_cast<const unsigned char*>(p);
    if (first >= stacks && first < stacks + most_threads * stack_bytes) return;
    const unsigned passes = warp_of(fibre).seen[fibre.index / warp_size];
    const Access now{launches, blockIdx.x, fibre.index, block.barriers, passes, fibre.seen[fibre.lane], at, code};
    if (first >= shared && first < shared + shared_bytes) {
        const auto begin = static_cast<size_t>(first - shared), end = std::min(begin + bytes, shared_bytes);
        for (size_t i = begin / 2; i < (end + 1) / 2; ++i) record(shared_cells[i], now, write, fibre);
    } else {
        const auto begin = reinterpret_cast<uintptr_t>(p);
        for (uintptr_t i = begin / 2; i < (begin + bytes + 1) / 2; ++i) record(global_cells[i], now, write, fibre);
    }
}

COMPACTER_NO_TSAN inline void touch_by_code(const void* p, size_t bytes, bool write, const void* code) {
    if (!in_kernel) return;
    in_kernel = false;
    touch(*self, {}, p, bytes, write, code);
    in_kernel = true;
}

}  // namespace cuda_on_cpu

#define COMPACTER_HOOK(name, write)                                                                                  \
    COMPACTER_HOOK_OF(name##1, 1, write) COMPACTER_HOOK_OF(name##2, 2, write) COMPACTER_HOOK_OF(name##4, 4, write)   \
    COMPACTER_HOOK_OF(name##8, 8, write) COMPACTER_HOOK_OF(name##16, 16, write)
#define COMPACTER_HOOK_OF(name, bytes, write)                                                                        \
    COMPACTER_NO_TSAN __attribute__((used)) inline void name(void* p) {                                              \
        cuda_on_cpu::touch_by_code(p, bytes, write, __builtin_return_address(0));                                    \
    }

extern "C" {
COMPACTER_HOOK(__tsan_read, false)
COMPACTER_HOOK(__tsan_write, true)
COMPACTER_HOOK(__tsan_unaligned_read, false)
COMPACTER_HOOK(__tsan_unaligned_write, true)
COMPACTER_NO_TSAN __attribute__((used)) inline void __tsan_read_range(void* p, size_t bytes) {
    cuda_on_cpu::touch_by_code(p, bytes, false, __builtin_return_address(0));
}
COMPACTER_NO_TSAN __attribute__((used)) inline void __tsan_write_range(void* p, size_t bytes) {
    cuda_on_cpu::touch_by_code(p, bytes, true, __builtin_return_address(0));
}
COMPACTER_NO_TSAN __attribute__((used)) inline void __tsan_init() {}
COMPACTER_NO_TSAN __attribute__((used)) inline void __tsan_func_entry(void*) {}
COMPACTER_NO_TSAN __attribute__((used)) inline void __tsan_func_exit() {}
COMPACTER_NO_TSAN __attribute__((used)) inline void __tsan_vptr_update(void**, void*) {}
COMPACTER_NO_TSAN __attribute__((used)) inline void __tsan_vptr_read(void**) {}
}

#endif

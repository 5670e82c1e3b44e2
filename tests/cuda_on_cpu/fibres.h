// The threads of one block as fibres of one thread of the CPU: who can run, who waits for what, who runs next.
#pragma once

#include <sys/mman.h>

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "switch.h"

namespace cuda_on_cpu {

constexpr int warp_size = 32, most_threads = 1024, most_warps = most_threads / warp_size;
constexpr uint32_t whole_warp = 0xffffffff;
constexpr size_t most_shared_bytes = 227 << 10;  // that a block of sm_90 may have
constexpr size_t stack_bytes = 256 << 10, guard_bytes = 4 << 10;

// An instruction of a kernel, and where in the source it stands.
struct Place {
    const char *what = "", *file = "";
    int line = 0;

    std::string text() const {
        const char* slash = strrchr(file, '/');
        return std::string(what) + " (" + (slash ? slash + 1 : file) + ":" + std::to_string(line) + ")";
    }
    friend bool operator==(const Place& a, const Place& b) {
        return !strcmp(a.what, b.what) && !strcmp(a.file, b.file) && a.line == b.line;
    }
};
// As a default argument: the place of the call.
constexpr Place here(const char* what, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {what, file, line};
}

// 16 bytes under way to shared memory, in the group of that number.
struct Copy {
    unsigned char* to;
    unsigned char bytes[16];
    unsigned group;
};

struct Fibre {
    Context context;
    int index = 0, lane = 0;
    Place at;                           // what it waits at
    uint32_t mask = 0;                  // the lanes it waits for, itself included; 0: all of the block
    void* part = nullptr;               // what it brings to a collective
    std::vector<Copy> copies;
    unsigned group = 0;                 // the number of the group of copies that is open
    bool waited = false;                // for the previous kernel
    uint32_t seen[warp_size] = {};      // race_check.h: for each lane, how many of its epochs came before now
};

struct Warp {
    uint32_t lanes = 0, live = 0;       // all; those that have not left the kernel
    unsigned seen[most_warps] = {};     // race_check.h: for each warp, how many named barriers of its own came before now
    uint32_t ready = 0, waiting = 0;    // of the live ones: able to run; parked at a collective (neither: at a barrier)
};

struct Block {
    std::vector<std::unique_ptr<Fibre>> fibres;  // more than `threads` if an earlier block had more
    std::vector<Warp> warps;
    int threads = 0, live = 0, at_barrier = 0;
    unsigned barriers = 0;                       // how many it has passed
    std::vector<int> named[16];                  // who waits at the barrier of this name
    bool waited = false;                         // some thread has waited for the previous kernel, a barrier ago
};

inline unsigned char* map_stacks() {
    void* found = mmap(nullptr, most_threads * stack_bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    return static_cast<unsigned char*>(found);
}

inline unsigned char* const stacks = map_stacks();  // each ends, at its lower end, in a page that nothing may touch
alignas(128) inline unsigned char shared[most_shared_bytes];
inline size_t shared_bytes = 0;                     // of the running launch
inline Block block;
inline Fibre* self = nullptr;   // whose turn it is
inline Context scheduler;
inline std::function<void()> kernel;
inline std::string failure;
inline unsigned order = 0;
inline std::mt19937 dice;
inline bool any_waited = false;  // for the previous kernel, in this launch
inline bool in_kernel = false;  // for race_check.h: neither in the scheduler nor in an instruction's own code

// Held by whatever the kernel calls here while it is not the kernel that touches memory.
struct Machinery {
    __attribute__((noinline, no_sanitize("thread"))) Machinery() { in_kernel = false; }
    __attribute__((noinline, no_sanitize("thread"))) ~Machinery() { in_kernel = true; }
};

inline Warp& warp_of(const Fibre& fibre) { return block.warps[fibre.index / warp_size]; }
inline uint32_t bit_of(const Fibre& fibre) { return 1u << fibre.lane; }

// Back to the scheduler until this fibre is ready and its turn has come.
inline void park() { switch_context(self->context, scheduler); }

// Ends the launch.
[[noreturn]] inline void fail(const std::string& why) {
    failure = why + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(self->index) + ")";
    for (;;) park();
}

// A barrier opens when all live threads are there. Called where that may have become true.
inline void open_barrier() {
    if (!block.at_barrier || block.at_barrier < block.live) return;
    const Place* first = nullptr;
    for (int i = 0; i < block.threads; ++i) {
        const Fibre& f = *block.fibres[i];
        if (!(warp_of(f).live & bit_of(f))) continue;
        if (first && !(*first == f.at)) fail("divergence: " + first->text() + " meets " + f.at.text());
        first = &f.at;
        block.waited |= f.waited;
    }
    for (Warp& warp : block.warps) warp.ready = warp.live;
    block.at_barrier = 0;
    ++block.barriers;
}

// Parks until `threads` threads are at the barrier of that name. All of a warp must come.
inline void named_barrier(const Place& at, int name, int threads) {
    Machinery guard;
    if (name < 1 || name > 15) fail(at.text() + ": there is no such barrier");
    if (threads % warp_size || threads > block.threads) fail(at.text() + ": the number of threads is not that of warps");
    std::vector<int>& there = block.named[name];
    self->at = at;
    self->mask = 0;
    there.push_back(self->index);
    if (static_cast<int>(there.size()) == threads) {
        unsigned joint[most_warps] = {};
        for (int index : there) {
            Warp& warp = warp_of(*block.fibres[index]);
            if (index % warp_size == 0) ++warp.seen[index / warp_size];
            for (int w = 0; w < most_warps; ++w) joint[w] = std::max(joint[w], warp.seen[w]);
        }
        for (int index : there) {
            Warp& warp = warp_of(*block.fibres[index]);
            std::copy(std::begin(joint), std::end(joint), warp.seen);
            warp.ready |= bit_of(*block.fibres[index]);
        }
        there.clear();
    }
    park();
}

inline void fibre_main() {
    entered_from(scheduler);
    for (;;) {
        kernel();
        Machinery guard;
        warp_of(*self).live &= ~bit_of(*self);
        --block.live;
        open_barrier();
        park();
    }
}

inline void restart(int index) {
    unsigned char* stack = stacks + index * stack_bytes;
    prepare(block.fibres[index]->context, stack + guard_bytes, stack_bytes - guard_bytes, fibre_main);
}

inline void start_block(int threads) {
    while (static_cast<int>(block.fibres.size()) < threads) {
        const int index = static_cast<int>(block.fibres.size());
        block.fibres.push_back(std::make_unique<Fibre>());
        block.fibres.back()->index = index;
        block.fibres.back()->lane = index % warp_size;
        mprotect(stacks + index * stack_bytes, guard_bytes, PROT_NONE);
        restart(index);
    }
    block.warps.assign((threads + warp_size - 1) / warp_size, {});
    block.threads = block.live = threads;
    block.at_barrier = 0;
    block.barriers = 0;
    block.waited = false;
    for (auto& waiting : block.named) waiting.clear();
    for (int i = 0; i < threads; ++i) {
        Fibre& f = *block.fibres[i];
        f.copies.clear();
        f.group = 0;
        f.waited = false;
        std::fill(std::begin(f.seen), std::end(f.seen), 0);
        warp_of(f).lanes |= bit_of(f);
    }
    for (Warp& warp : block.warps) warp.live = warp.ready = warp.lanes;
}

// Upwards and downwards, a warp goes as far as it can before the next one starts; at random, a lane does.
inline Fibre* next_fibre() {
    const int warps = static_cast<int>(block.warps.size());
    const int first = order > 1 ? static_cast<int>(dice() % warps) : 0;
    for (int i = 0; i < warps; ++i) {
        const int w = order == 1 ? warps - 1 - i : (first + i) % warps;
        const uint32_t ready = block.warps[w].ready;
        if (!ready) continue;
        const uint32_t above = order > 1 ? ready & (whole_warp << dice() % warp_size) : ready;
        const int lane = order == 1 ? 31 - __builtin_clz(ready) : __builtin_ctz(above ? above : ready);
        return block.fibres[w * warp_size + lane].get();
    }
    return nullptr;
}

inline std::string deadlock() {
    std::string report = "deadlock in block " + std::to_string(blockIdx.x) + ":", last;
    for (int i = 0, first = 0; i <= block.threads; ++i) {
        std::string state;
        if (i < block.threads) {
            const Fibre& f = *block.fibres[i];
            char mask[32] = "";
            if (f.mask) snprintf(mask, sizeof mask, " of lanes %08x", f.mask);
            state = warp_of(f).live & bit_of(f) ? " at " + f.at.text() + mask : " left";
        }
        if (i && state != last) {
            report += " threads " + std::to_string(first) + ".." + std::to_string(i - 1) + last + ";";
            first = i;
        }
        last = state;
    }
    return report;
}

// Until every thread has left the kernel, or `failure` says what has gone wrong.
inline void run_block(int threads) {
    start_block(threads);
    while (Fibre* next = next_fibre()) {
        self = next;
        warp_of(*self).ready &= ~bit_of(*self);
        threadIdx.x = static_cast<unsigned>(self->index);
        in_kernel = true;
        switch_context(scheduler, self->context);
        in_kernel = false;
        if (!failure.empty()) break;
    }
    if (failure.empty() && block.live) failure = deadlock();
    if (!failure.empty())
        for (int i = 0; i < threads; ++i) restart(i);  // they are stuck somewhere in the kernel: they forget it
}

}  // namespace cuda_on_cpu

// What the threads of a block, or the lanes of a warp, do together. A lane parks until all whom it names are there; the
// last one to come does the work for all.
#pragma once

#include "fibres.h"

namespace cuda_on_cpu {

// All lanes of `mask` are parked here. Some may wait for other lanes: then this is not yet their meeting.
inline bool all_meet(uint32_t mask, bool aligned) {
    const int first = self->index - self->lane;
    for (int lane = 0; lane < warp_size; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const Fibre& other = *block.fibres[first + lane];
        if (other.mask != mask) return false;
        // the same instruction on another line will do for shuffles and __syncwarp, not for what ends in .aligned
        if (aligned ? !(other.at == self->at) : strcmp(other.at.what, self->at.what) != 0)
            fail("divergence: " + self->at.text() + " meets " + other.at.text() + " of lane " + std::to_string(lane));
    }
    return true;
}

// work(parts): each lane's `part`, null for lanes that are not in `mask`.
template <class Part, class Work>
void collective(const Place& at, uint32_t mask, bool aligned, Part& part, const Work& work) {
    Machinery guard;
    Warp& warp = warp_of(*self);
    if (!(mask & bit_of(*self))) fail(at.text() + ": the lane is not in its own mask");
    if (mask & ~warp.lanes) fail(at.text() + ": the mask names lanes that the block does not have");
    if (mask & ~warp.live) fail(at.text() + ": the mask names lanes that have left the kernel");
    self->at = at;
    self->mask = mask;
    self->part = &part;
    warp.waiting |= bit_of(*self);
    if ((warp.waiting & mask) == mask && all_meet(mask, aligned)) {
        Part* parts[warp_size] = {};
        for (int lane = 0; lane < warp_size; ++lane)
            if (mask >> lane & 1) parts[lane] = static_cast<Part*>(block.fibres[self->index - self->lane + lane]->part);
        work(parts);
        warp.waiting &= ~mask;
        warp.ready |= mask;
    }
    park();
}

// from(lane): the lane whose value this one receives.
template <class T, class From>
T shuffle(const Place& at, uint32_t mask, const T& value, const From& from) {
    static_assert(sizeof(T) <= 8, "a shuffle moves a number");
    struct Part {
        T in, out;
        int from;
    } part{value, value, from(self->lane)};
    collective(at, mask, false, part, [](Part* const (&parts)[warp_size]) {
        for (Part* part : parts) {
            if (!part) continue;
            if (parts[part->from]) part->out = parts[part->from]->in;
            else memset(&part->out, 0xff, sizeof(T));
        }
    });
    return part.out;
}

}  // namespace cuda_on_cpu

inline void __syncthreads(cuda_on_cpu::Place at = cuda_on_cpu::here("__syncthreads")) {
    using namespace cuda_on_cpu;
    Machinery guard;
    self->at = at;
    self->mask = 0;
    ++block.at_barrier;
    open_barrier();
    park();
}

inline void __syncwarp(unsigned mask = cuda_on_cpu::whole_warp,
                       cuda_on_cpu::Place at = cuda_on_cpu::here("__syncwarp")) {
    using cuda_on_cpu::Fibre;
    cuda_on_cpu::collective(at, mask, false, *cuda_on_cpu::self, cuda_on_cpu::join_lanes);
}

// `width` cuts the warp into groups of lanes that shuffle among themselves.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              cuda_on_cpu::Place at = cuda_on_cpu::here("__shfl_sync")) {
    return cuda_on_cpu::shuffle(at, mask, value,
                                [=](int lane) { return (lane & -width) + (source & (width - 1)); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32,
                  cuda_on_cpu::Place at = cuda_on_cpu::here("__shfl_xor_sync")) {
    return cuda_on_cpu::shuffle(at, mask, value, [=](int lane) {
        const int source = lane ^ flip;
        return source < (lane & -width) + width ? source : lane;
    });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cuda_on_cpu::Place at = cuda_on_cpu::here("__shfl_down_sync")) {
    return cuda_on_cpu::shuffle(at, mask, value, [=](int lane) {
        return (lane & (width - 1)) + static_cast<int>(delta) < width ? lane + static_cast<int>(delta) : lane;
    });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 cuda_on_cpu::Place at = cuda_on_cpu::here("__shfl_up_sync")) {
    return cuda_on_cpu::shuffle(at, mask, value, [=](int lane) {
        return (lane & (width - 1)) >= static_cast<int>(delta) ? lane - static_cast<int>(delta) : lane;
    });
}

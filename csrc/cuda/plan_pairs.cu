// The plan of the kernels whose tiles are pairs of chunks.
#include <algorithm>

#include "folded.h"
#include "plan.h"

namespace compacter::cuda {
namespace {

// The layout of forward with these groups of warps. Returns the bytes of shared memory.
template <class P>
int lay_out(PairForward& f, int groups) {
    PairSizes& s = f.sizes;
    const auto fragments = [](int64_t count) { return count * 256; };
    const int blocks = s.in / 16, steps = s.steps();
    s.group = P::owners * s.shares();
    Room room;
    f.left = room.take(fragments(int64_t{blocks} * P::left_fragments));
    f.right2 = room.take(fragments(int64_t{2} * blocks * P::operands));
    f.c1 = room.take(fragments(int64_t{2} * steps * P::steps));
    f.c2 = room.take(fragments(int64_t{P::count} * steps * P::v_fragments));
    f.bias = room.floats(int64_t{16} * steps);
    f.exchange_bytes = 512 * (P::steps + steps + (s.log_shares ? P::steps * s.shares() : 0));
    f.exchange = room.take(int64_t{groups} * f.exchange_bytes);
    const int64_t tiles = int64_t{groups} * s.tile_bytes(), raw = int64_t{4} * RawFactors::floats(s.n, s.in, s.bottleneck);
    f.ring = room.take(tiles);
    f.raw = room.take(std::max(tiles, raw));
    return room.bytes;
}

// As many groups as memory and warps allow, with few tokens too, since all warps prepare the weights. If warps
// are left, they share the columns. Only the grid depends on the number of tokens, and so no order of a sum does.
template <class P>
PlannedPairForward plan(const Problem& problem, const Device& device) {
    PlannedPairForward plan{};
    PairForward& f = plan.arguments;
    PairSizes& s = f.sizes;
    f.factors = factors_of(problem);
    f.tokens = problem.tokens;
    s.n = P::n;
    s.width = static_cast<int>(problem.down->in);
    s.in = s.width / s.n;
    s.bottleneck = static_cast<int>(problem.down->out);
    s.inner = s.bottleneck / s.n;
    s.row = s.width * 2 + 16;
    s.by_inner = Divisor(s.inner);
    s.by_in = Divisor(s.in);
    const auto fit = [&](int groups, int log_shares) {
        s.log_shares = log_shares;
        return groups * P::owners << log_shares <= P::most_warps && lay_out<P>(f, groups) <= device.shared_limit;
    };
    int groups = 1, log_shares = 0;
    while (fit(groups + 1, 0)) ++groups;
    while (2 << log_shares < s.in / 16 && fit(groups, log_shares + 1)) ++log_shares;
    s.log_shares = log_shares;

    const int bytes = lay_out<P>(f, groups);
    const int64_t blocks = std::clamp<int64_t>((problem.tokens + 7) / 8, 1, device.multiprocessors);
    plan.launch = {static_cast<int>(blocks), groups * s.group * 32, bytes, nullptr, false};
    return plan;
}

}  // namespace

bool pairs_serve(const Problem& p) {
    if (!p.up || p.dtype != DType::bf16 || p.down->rank != 1 || p.up->rank != 1 || p.down->n_in != p.up->n_in) return false;
    const int64_t n = p.down->n_in;
    return (n == 4 || n == 8 || n == 12) && p.down->in / n % 16 == 0 && p.down->out % 8 == 0;
}

PlannedPairForward plan_pair_forward(const Problem& problem, const Device& device) {
    if (problem.down->n_in == 4) return plan<Pairs<4>>(problem, device);
    if (problem.down->n_in == 8) return plan<Pairs<8>>(problem, device);
    return plan<Pairs<12>>(problem, device);
}

}  // namespace compacter::cuda

#include "plan.h"

#include <algorithm>

#include "gradients.h"
#include "shapes.h"
#include "sides.h"
#include "tile.h"
#include "wide.h"

namespace compacter::cuda {
namespace {

constexpr int reserved = 1024;  // bytes of shared memory that the system takes for each block
constexpr int max_warps = 8;

// The tokens of the smallest tile, whose rows are a multiple of 16.
int least_tokens(int n) { return n == 12 ? 4 : 16 / n; }

// The blocks with this shared memory that a multiprocessor holds, but at most `most`.
int blocks_per_multiprocessor(const Device& device, int bytes, int most) {
    return std::clamp(device.shared_per_multiprocessor / (bytes + reserved), 1, most);
}

// The blocks that the registers of an instance allow: see __launch_bounds__ of the kernels.
template <bool WithKnown = true>
int blocks_by_registers(const Sizes& s) {
    return with_instance<WithKnown>(s, [](auto known) { return decltype(known)::general ? 1 : 2; });
}

int grid(const Device& device, int bytes, int most, int64_t wanted) {
    const int64_t room = static_cast<int64_t>(device.multiprocessors) * blocks_per_multiprocessor(device, bytes, most);
    return static_cast<int>(std::max<int64_t>(1, std::min(room, wanted)));
}

Sizes sizes_of(const Problem& problem, int tokens) { return sizes_of(problem, tokens, static_cast<int>(problem.down->n_in)); }

}  // namespace

Problem problem_of(const Linear& l) { return {&l.projection, nullptr, l.dtype, l.scale, Activation::identity, l.tokens}; }
Problem problem_of(const Adapter& a) { return {&a.down, &a.up, a.dtype, a.scale, a.activation, a.tokens}; }

Sizes sizes_of(const Problem& problem, int tokens, int n) {
    const Projection &first = *problem.down, &last = problem.up ? *problem.up : first;
    Sizes s{};
    s.n = n;
    s.rank = first.dense() ? 1 : static_cast<int>(first.rank);
    s.terms = static_cast<short>(first.terms);
    s.m = static_cast<int>(first.dense() ? first.out : first.terms * first.rank);
    s.in = static_cast<int>(first.in / first.n_in);
    s.inner = problem.up && !first.dense() ? static_cast<int>(first.out / first.n_out) : 0;
    s.out = static_cast<int>(last.out / last.n_out);
    const int quad = s.n % 4 == 0 ? 4 : 1;
    s.blocks = s.n / quad;
    s.rule_stride = s.n * s.n + quad;
    s.inner_stride = s.inner | 1;
    s.tokens = tokens;
    s.by_n = Divisor(s.n);
    s.by_m = Divisor(s.m);
    s.by_blocks = Divisor(s.blocks);
    s.by_inner = Divisor(std::max(s.inner, 1));
    s.in_vectors = s.in % 8 == 0;
    s.out_vectors = s.out % 8 == 0;
    return s;
}

Row row_of(const Problem& problem) {
    Row row{};
    int64_t at = 0;
    for (const Projection* p : {problem.down, problem.up}) {
        if (!p) continue;
        const int64_t bias = p->weights.bias.data ? p->out : 0;
        for (const int64_t count : {p->n_in * p->n_in * p->n_in, p->in * p->rank, p->out * p->rank, bias}) {
            row.begin[row.count++] = static_cast<int>(at);
            at += count;
        }
    }
    row.begin[row.count] = static_cast<int>(at);
    row.floats = (at + 3) / 4 * 4;
    return row;
}

Factors factors_of(const Problem& problem) {
    const Parameters &first = problem.down->weights, &last = problem.up ? problem.up->weights : first;
    Factors f{};
    f.rule = first.rule;
    f.left = first.left;
    f.right2 = last.right;
    f.bias2 = last.bias;
    if (problem.up) {
        f.right = first.right;
        f.bias = first.bias;
        f.rule2 = last.rule;
        f.left2 = last.left;
    }
    f.scale = problem.scale;
    f.activation = problem.activation;
    return f;
}

PlannedForward plan_forward(const Problem& problem, const Device& device) {
    PlannedForward plan{};
    Forward& f = plan.arguments;
    const Sizes s = f.sizes = sizes_of(problem, least_tokens(static_cast<int>(problem.down->n_in)));
    f.factors = factors_of(problem);
    f.tokens = problem.tokens;
    const int terms = s.m + (f.factors.bias2.data ? s.n : 0);

    Room room, warp;
    int most_blocks = 1;
    with_element(problem.dtype, [&](auto element) {
        using T = decltype(element);
        most_blocks = blocks_by_registers<known_forward<T>>(s);
        f.left = room.take(factor_bytes(s.in, s.m, T::factor_parts));
        f.right2 = room.take(factor_bytes(s.out, terms, T::factor_parts));
    });
    f.shared = SharedFactors(s, room);
    f.z = warp.floats(s.numbers());
    f.v = warp.floats(s.numbers());
    f.h = warp.floats(s.inner_numbers());
    f.scratch = room.bytes;
    f.scratch_bytes = warp.bytes;

    // As many warps as memory and work allow, but few tiles spread over many multiprocessors.
    const int64_t tiles = (problem.tokens + s.tokens - 1) / s.tokens;
    const int64_t spread = (tiles + device.multiprocessors - 1) / device.multiprocessors;
    int warps = static_cast<int>(std::clamp<int64_t>(spread, 4, max_warps));
    while (warps > 1 && room.bytes + static_cast<int64_t>(warps) * warp.bytes > device.shared_limit) --warps;
    Room all = room;
    all.take(static_cast<int64_t>(warps) * warp.bytes);
    plan.launch = {grid(device, all.bytes, most_blocks, (tiles + warps - 1) / warps), warps * 32, all.bytes, nullptr, false};
    return plan;
}

namespace {

// The layout of backward with this number of tokens in a tile, and of stages.
template <class T>
int lay_out(Backward& b, const Problem& problem, int tokens, int stages, int warps) {
    const Sizes s = b.sizes = sizes_of(problem, tokens);
    const int columns = eights(s.m), right_terms = s.m + (b.has_bias2 ? s.n : 0), right_columns = eights(right_terms);
    const int64_t matrix = static_cast<int64_t>(s.n) * s.rule_stride;
    const auto sums = [](int width, int terms) { return int64_t{16} * sum_vectors(terms) * ((width + 15) / 16); };
    Room room;
    b.left_factor = room.take(factor_bytes(s.in, s.m, T::factor_parts));
    b.right2_factor = room.take(factor_bytes(s.out, s.m, T::factor_parts));
    b.shared = SharedFactors(s, room);
    b.left_sums = room.take(sums(s.in, s.m));
    b.right_sums = room.take(sums(s.out, right_terms));
    b.sums.rule = room.floats(matrix);
    b.sums.rule2 = room.floats(s.inner ? matrix : 0);
    b.sums.right = room.floats(static_cast<int64_t>(s.m) * s.inner);
    b.sums.left2 = room.floats(static_cast<int64_t>(s.m) * s.inner);
    b.sums.bias = room.floats(static_cast<int64_t>(s.n) * s.inner);

    b.stages = stages;
    b.x_stride = row_bytes<T>(s.in);
    b.g_stride = row_bytes<T>(s.out);
    b.tile_bytes = s.rows() * (b.x_stride + b.g_stride);
    b.tile = room.take(static_cast<int64_t>(stages) * b.tile_bytes);

    const int shares = std::min({std::max(1, warps * 16 / (2 * s.rows())), segments(s.in), segments(s.out)});
    b.splits = shares;
    b.numbers.z = room.floats(static_cast<int64_t>(shares) * s.numbers());
    b.numbers.dv2 = room.floats(static_cast<int64_t>(shares) * s.numbers());
    for (int* numbers : {&b.numbers.v, &b.numbers.dz2, &b.numbers.z2, &b.numbers.dv}) *numbers = room.floats(s.inner ? s.numbers() : 0);
    b.numbers.h = room.floats(s.inner_numbers());
    b.numbers.dy = room.floats(s.inner_numbers());
    b.part_stride = s.rows() + 8;
    b.v_parts = room.take(2ll * T::factor_parts * right_columns * 8 * b.part_stride);
    b.dz_parts = room.take(2ll * T::factor_parts * columns * 8 * b.part_stride);
    return room.bytes;
}

// Plans a kernel for known sizes, with a block on each multiprocessor. Returns whether it fits.
template <class S>
bool plan_known(PlannedBackward& plan, const Problem& problem, const Device& device, BackwardKernel kernel, int stages,
                int threads, int bytes) {
    Backward& b = plan.arguments;
    const int64_t tiles = (problem.tokens + S::tokens - 1) / S::tokens;
    b.sizes = sizes_of(problem, S::tokens);
    b.kernel = kernel;
    b.stages = stages;
    plan.launch = {static_cast<int>(std::clamp<int64_t>(tiles, 1, device.multiprocessors)), threads, bytes, nullptr, false};
    return bytes <= device.shared_limit;
}

// The kernel in backward.cu: as many groups as fit, with two tiles in flight for each if there is room.
template <class S>
bool plan_folded(PlannedBackward& plan, const Problem& problem, const Device& device) {
    int groups = S::most_groups;
    while (groups > 1 && S::bytes(groups, 1) > device.shared_limit) --groups;
    const int stages = S::bytes(groups, 2) <= device.shared_limit ? 2 : 1, bytes = S::bytes(groups, stages);
    const bool fits = plan_known<S>(plan, problem, device, BackwardKernel::folded, stages, groups * S::group * 32, bytes);
    plan.arguments.block_tokens = static_cast<int>(problem.tokens / plan.launch.blocks);
    plan.arguments.longer_blocks = static_cast<int>(problem.tokens % plan.launch.blocks);
    return fits;
}

// Plans the kernel that knows the sizes of the problem. Returns false if there is none, or if it does not fit.
bool plan_for_sizes(PlannedBackward& plan, const Problem& problem, const Device& device) {
    const Sizes sizes = sizes_of(problem, 1);
    bool fits = false;
    with_shape(sizes, [&](auto shape) { fits = plan_folded<decltype(shape)>(plan, problem, device); }) ||
        with_sides(sizes, [&](auto shape) {
            using S = decltype(shape);
            fits = plan_known<S>(plan, problem, device, BackwardKernel::sides, S::stages, S::threads, S::bytes);
        }) ||
        with_wide(sizes, [&](auto shape) {
            using S = decltype(shape);
            fits = plan_known<S>(plan, problem, device, BackwardKernel::wide, S::stages, 32 * S::warps, S::bytes);
        });
    return fits;
}

}  // namespace

PlannedBackward plan_backward(const Problem& problem, const Device& device, bool aligned) {
    PlannedBackward plan{};
    Backward& b = plan.arguments;
    b.factors = factors_of(problem);
    b.has_bias2 = b.factors.bias2.data != nullptr;
    b.tokens = problem.tokens;
    const Row row = row_of(problem);
    b.row = row.floats;
    const int last = row.count - 4;  // the start of `up`; one projection is both down and up
    b.rule = row.begin[0];
    b.left = row.begin[1];
    b.right = row.begin[2];
    b.bias = row.begin[3];
    b.rule2 = row.begin[last];
    b.left2 = row.begin[last + 1];
    b.right2 = row.begin[last + 2];
    b.bias2 = row.begin[last + 3];
    if (aligned && problem.dtype == DType::bf16 && problem.up && plan_for_sizes(plan, problem, device)) return plan;
    b.kernel = BackwardKernel::general;

    // The first choice that fits twice on a multiprocessor, else the first that fits at all: 32 or
    // 16 rows (48 for n = 12), with or without the next tile in flight.
    const int n = static_cast<int>(problem.down->n_in), least = least_tokens(n), more = n == 12 || n == 1 ? least : 2 * least;
    const int choices[][2] = {{more, 2}, {more, 1}, {least, 2}, {least, 1}};
    const auto bytes_of = [&](int choice) {
        return with_element(problem.dtype, [&](auto element) {
            return lay_out<decltype(element)>(b, problem, choices[choice][0], choices[choice][1], max_warps);
        });
    };
    const int half = std::min(device.shared_limit, device.shared_per_multiprocessor / 2 - reserved);
    int chosen = 3;
    for (const int limit : {device.shared_limit, half})  // the last assignment wins
        for (int choice = 3; choice >= 0; --choice)
            if (bytes_of(choice) <= limit) chosen = choice;
    const int bytes = bytes_of(chosen);
    const int64_t tiles = (problem.tokens + b.sizes.tokens - 1) / b.sizes.tokens;
    plan.launch = {grid(device, bytes, blocks_by_registers(b.sizes), tiles), max_warps * 32, bytes, nullptr, false};
    return plan;
}

}  // namespace compacter::cuda

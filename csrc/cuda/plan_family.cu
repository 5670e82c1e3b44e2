#include "plan_family.h"

#include <algorithm>

#include "gradients.h"
#include "tile.h"

namespace compacter::cuda {
namespace {

constexpr int of_backward = 1, of_weights = 2;  // blocks of a multiprocessor, as the registers allow
constexpr int threads = 256, most_rows = 128, pair_tokens = 8;
constexpr int whole_factors = 1 << 20;  // more segments than a factor has
constexpr int reserved = 1024;  // bytes of shared memory that the system takes for each block

Factor left_factor(const Projection& p) {
    const int in = static_cast<int>(p.in / p.n_in), rank = static_cast<int>(p.rank);
    if (!p.dense()) return {p.weights.left, p.in * p.terms / p.n_in * p.rank, in * rank, 1, rank};
    if (p.transposed) return {p.weights.left, p.in * p.out, in, 0, 1};
    return {p.weights.left, p.in * p.out, 1, 0, static_cast<int>(p.out)};
}

Factor right_factor(const Projection& p) {
    const int out = static_cast<int>(p.out / p.n_out), rank = static_cast<int>(p.rank);
    if (!p.dense()) return {p.weights.right, p.terms * p.rank * out, rank * out, out, 1};
    if (p.transposed) return {p.weights.left, p.in * p.out, 1, 0, static_cast<int>(p.in)};
    return {p.weights.left, p.in * p.out, out, 0, 1};
}

// The sizes of the folded matrices of an adapter whose parameters are there.
Folded folded_of(const Family& f, int tokens) {
    Folded folded{};
    folded.rows = f.n_in * f.middle.m;
    folded.padded_rows = round_up(folded.rows, 16);
    folded.width = f.n_in * f.middle.inner;
    folded.padded_width = round_up(folded.width, 8);
    folded.stride = (folded.padded_width / 8 | 1) * 8;
    folded.z_stride = f.slots * folded.padded_rows + 8;
    folded.h_stride = (f.slots * folded.padded_width / 8 | 1) * 8;
    folded.by_n = Divisor(f.n_in);
    folded.by_slots = Divisor(f.slots);
    folded.by_groups = Divisor((tokens + 15) / 16);
    folded.by_rows = Divisor(folded.padded_rows / 16);
    return folded;
}

// The sizes and parameters of a problem, for tiles of so many tokens.
Family family(const FamilyProblem& problem, int tokens, bool folded = false) {
    const Projection &first = *problem.problem.down, &last = problem.problem.up ? *problem.problem.up : first;
    const Bank* bank = problem.bank;
    Family f{};
    f.dense = first.dense();
    f.mixed = bank && !bank->route;
    f.n_in = static_cast<int>(first.n_in);
    f.n_out = static_cast<int>(last.n_out);
    const Sizes& s = f.middle = sizes_of(problem.problem, tokens, f.dense ? 1 : round_up(std::max(f.n_in, f.n_out), 4));
    const int adapters = bank ? static_cast<int>(bank->count) : 1;
    f.slots = f.mixed ? adapters : 1;
    f.left = left_factor(first);
    f.right2 = right_factor(last);
    f.bias2 = {last.weights.bias, last.out, s.out, 0, 1};
    f.columns = f.slots * s.m;
    f.right_terms = f.columns + (f.bias2.array.data ? f.slots * f.n_out : 0);
    f.rows_in = round_up(tokens * f.n_in, 16);
    f.rows_out = round_up(tokens * f.n_out, 16);
    f.stride = round_up(tokens * s.n, 16) + 4;  // so that two c of eight rows are in different banks
    f.quads = f.dense ? tokens / 4 : tokens * s.blocks;
    f.by_n_in = Divisor(f.n_in);
    f.by_n_out = Divisor(f.n_out);
    f.by_groups_in = Divisor(f.rows_in / 16);
    f.by_groups_out = Divisor(f.rows_out / 16);
    f.by_rank = Divisor(s.rank);
    f.by_quads = Divisor(f.quads);
    f.rule = first.weights.rule;
    if (problem.problem.up) {
        f.bias = first.weights.bias;
        f.right = first.weights.right;
        f.rule2 = last.weights.rule;
        f.left2 = last.weights.left;
    }
    if (bank) {
        f.shared_rule = bank->shared_rule_down;
        f.shared_rule2 = bank->shared_rule_up;
        f.mix = bank->mix;
    }
    if (folded) f.folded = folded_of(f, tokens);
    f.scale = problem.problem.scale;
    f.activation = problem.problem.activation;

    Tiling& t = f.tiling;
    const int all = static_cast<int>(problem.problem.tokens);
    t.adapters = adapters;
    t.tokens = tokens;
    t.all = all;
    t.group = bank && bank->groups ? static_cast<int>(all / bank->groups) : std::max(all, 1);
    t.most = (all + tokens - 1) / tokens + (bank && bank->route ? t.buckets() : 0);
    return f;
}

// What both kernels that contract and expand share: the tokens, and the small factors of each slot.
void lay_out(FamilyPlaces& places, const Family& f, Room& room) {
    places.ids = room.take((f.tiling.tokens + 1) * 4);  // and the end of the tiles of a block
    places.mix = room.floats(int64_t{f.tiling.tokens} * f.slots);
    places.small = room.bytes;
    if (f.folded.rows) {
        places.folded.first = room.take(f.folded.bytes(f.folded.parts));
        places.folded.second = room.take(f.folded.bytes(f.folded.parts));
        places.folded.bias = room.floats(f.folded.padded_width);
    } else {
        places.factors = SharedFactors(f.middle, room);
    }
    places.factors_bytes = room.bytes - places.small;
    room.take(int64_t{f.slots - 1} * places.factors_bytes);
}

// The bytes of numbers of each token in parts, if the middle has folded matrices, or so many floats.
int64_t bytes_of_tokens(const Family& f, int stride, int parts, int64_t floats) {
    return f.folded.rows ? int64_t{2} * parts * round_up(f.middle.tokens, 16) * stride : floats * 4;
}

// The sums of the small gradients and the numbers of a tile in a backward, without and with folded matrices.
void lay_out_numbers(FamilyBackward& b, Room& room) {
    const Family& f = b.family;
    const int64_t numbers = int64_t{f.columns} * f.stride, inner = int64_t{f.inner()} * f.stride;
    b.sums_begin = room.bytes;
    const SharedFactors sums(f.middle, room);
    b.sums = {sums.rule, sums.rule2, sums.right, sums.left2, sums.bias};
    b.sums_bytes = room.bytes - b.sums_begin;
    room.take(int64_t{f.slots - 1} * b.sums_bytes);
    b.places.clear = b.numbers.z = room.floats(numbers);
    b.numbers.dv2 = room.floats(numbers);
    b.numbers.v = b.numbers.z2 = room.floats(f.middle.inner ? numbers : 0);
    b.numbers.dz2 = b.numbers.dv = room.floats(f.middle.inner ? numbers : 0);
    b.numbers.h = room.floats(inner);
    b.numbers.dy = room.floats(inner);
    b.mixed_v2 = room.floats(f.mixed && !f.dense ? numbers : 0);
}
void lay_out_folded(FamilyBackward& b, Room& room, int parts) {
    const Family& f = b.family;
    const Folded& folded = f.folded;
    b.sums_begin = room.bytes;
    b.folded_sums.first = room.floats(int64_t{folded.rows} * folded.stride);
    b.folded_sums.second = room.floats(int64_t{folded.rows} * folded.stride);
    b.folded_sums.bias = room.floats(folded.padded_width);
    b.sums_bytes = room.bytes - b.sums_begin;
    room.take(int64_t{f.slots - 1} * b.sums_bytes);
    b.of_mix = room.floats(f.mixed ? int64_t{folded.blocks()} * f.slots * f.middle.tokens : 0);
    b.numbers.h = room.take(bytes_of_tokens(f, folded.h_stride, parts, 0));
    b.numbers.dy = room.take(bytes_of_tokens(f, folded.h_stride, parts, 0));
    b.places.clear = b.numbers.z = room.take(bytes_of_tokens(f, folded.z_stride, parts, 0));
    b.numbers.dv2 = room.take(bytes_of_tokens(f, folded.z_stride, parts, 0));
}

// The wide factors, if they fit whole with what else there is, else two slabs in the same place. Returns whether they fit.
// parts: those of the numbers of each factor.
bool add_slabs(FamilyPlaces& places, const Family& f, int right_terms, int left_parts, int right_parts, Room& room, int limit,
               int least) {
    const int of_in = segments(f.middle.in), of_out = segments(f.middle.out);
    Room chosen = room;
    const int left_rows = round_up(f.columns, 8), right_rows = round_up(right_terms, 8);
    const int left_at = chosen.take(factor_bytes(f.middle.in, left_rows, left_parts));
    const int right2_at = chosen.take(factor_bytes(f.middle.out, right_rows, right_parts));
    places.left = {left_at, of_in, f.columns, left_rows, left_parts, true};
    places.right2 = {right2_at, of_out, right_terms, right_rows, right_parts, true};
    for (int count = std::max(of_in, of_out); chosen.bytes > limit && count >= least; --count) {
        chosen = room;
        const int at = chosen.take(2 * std::max(factor_bytes(count * segment, left_rows, left_parts),
                                                factor_bytes(count * segment, right_rows, right_parts)));
        places.left = {at, count, f.columns, left_rows, left_parts, false};
        places.right2 = {at, count, right_terms, right_rows, right_parts, false};
    }
    room = chosen;
    const auto bytes = [&](const Slab& slab) {
        return static_cast<int>(factor_bytes(slab.segments * segment, slab.rows, slab.parts));
    };
    const auto slabs = [](const Slab& slab, int all) { return (all + slab.segments - 1) / slab.segments; };
    Images& images = places.images;
    images.small = f.slots * places.factors_bytes;
    images.left_slab = bytes(places.left);
    images.right2_slab = bytes(places.right2);
    images.left = images.small;
    images.right2 = images.left + slabs(places.left, of_in) * images.left_slab;
    images.bytes = int64_t{images.right2} + int64_t{slabs(places.right2, of_out)} * images.right2_slab;
    return room.bytes <= limit;
}

bool folds(const FamilyProblem& p) { return p.problem.up && !p.problem.down->dense(); }

// Calls attempt(tokens, folded, limit, least segments of a slab) until it returns true: for many and for half as many tokens of
// a tile if the wide factors fit whole, if possible with folded matrices between them, then for fewer and fewer, for so many
// blocks of a multiprocessor and for one. The last attempt stands: its bytes tell why it does not fit.
template <class Attempt>
void first_that_fits(const FamilyProblem& problem, const Device& device, int blocks, const Attempt& attempt) {
    const Projection &first = *problem.problem.down, &last = problem.problem.up ? *problem.problem.up : first;
    const int n = static_cast<int>(std::max(first.n_in, last.n_out));
    const int share = std::min(device.shared_limit, device.shared_per_multiprocessor / blocks - reserved);
    const int most = first.dense() ? most_rows / 2 : most_rows;
    for (const bool folded : {true, false})
        for (const int rows : {most, most / 2})
            if (rows >= n && (!folded || folds(problem)) && attempt(rows / n, folded, share, whole_factors)) return;
    for (int rows = most;; rows /= 2) {
        const int tokens = std::max(1, rows / n);
        if (attempt(tokens, false, share, 2) || attempt(tokens, false, device.shared_limit, 1) || rows <= 16) return;
    }
}

// The numbers c of a block of the second kernel, of `all`.
int share_of_terms(int all) {
    const int blocks = (all + most_terms_of_weights - 1) / most_terms_of_weights;
    return round_up((all + blocks - 1) / blocks, 8);
}

int blocks_of(const Device& device, int bytes, int most) {
    return device.multiprocessors * std::clamp(device.shared_per_multiprocessor / (bytes + reserved), 1, most);
}

}  // namespace

FamilyProblem family_of(const Linear& l) { return {problem_of(l), nullptr}; }
FamilyProblem family_of(const Adapter& a, const Bank* bank) { return {problem_of(a), bank}; }

FamilySizes::FamilySizes(const Family& f) {
    const Sizes& s = f.middle;
    left = s.m * s.in;
    right2 = s.m * s.out;
    bias2 = f.bias2.array.data ? f.n_out * s.out : 0;
    rule = f.dense ? 0 : f.rule_size();
    right = left2 = f.inner_size();
    bias = f.bias_size();
    rule2 = s.inner ? rule : 0;
}

PlannedFamilyForward plan_family_forward(const FamilyProblem& problem, const Device& device) {
    PlannedFamilyForward plan{};
    FamilyForward& f = plan.arguments;
    Room room;
    const int of_forward = blocks_of_forward(device.capability);
    first_that_fits(problem, device, of_forward, [&](int tokens, bool folded, int limit, int least) {
        Family& its = f.family = family(problem, tokens, folded);
        const int64_t numbers = int64_t{its.columns} * its.stride;
        return with_element(problem.problem.dtype, [&](auto element) {
            constexpr int parts = decltype(element)::factor_parts;
            its.folded.parts = forward_right_parts<decltype(element)>;
            room = {};
            lay_out(f.places, its, room);
            f.places.clear = f.z = room.take(bytes_of_tokens(its, its.folded.z_stride, parts, numbers));
            f.part_stride = its.rows_out + 8;
            f.v = room.floats(its.middle.inner && !folded ? numbers : 0);
            f.h = room.take(bytes_of_tokens(its, its.folded.h_stride, parts, int64_t{its.inner()} * its.stride));
            f.v_parts = room.take(int64_t{2} * parts * round_up(its.right_terms, 16) * f.part_stride);
            f.places.clear_end = room.bytes;
            return add_slabs(f.places, its, its.right_terms, parts, forward_right_parts<decltype(element)>, room, limit, least);
        });
    });
    const int blocks = std::min(blocks_of(device, room.bytes, of_forward), std::max(f.family.tiling.most, 1));
    plan.launch = {blocks, threads, room.bytes, nullptr, false};
    return plan;
}

PlannedFamilyBackward plan_family_backward(const FamilyProblem& problem, const Device& device, const Wanted& wanted) {
    PlannedFamilyBackward plan{};
    FamilyBackward& b = plan.rows;
    FamilyWeights& w = plan.weights;
    Room room, of_weights_room;
    w.slab = 16;
    first_that_fits(problem, device, of_backward, [&](int tokens, bool folded, int limit, int least) {
        Family& its = b.family = family(problem, tokens, folded);
        const bool with_bias = its.mixed && wanted.mix && its.bias2.array.data;
        return with_element(problem.problem.dtype, [&](auto element) {
            using T = decltype(element);
            its.folded.parts = T::factor_parts;
            room = {};
            lay_out(b.places, its, room);
            if (folded) lay_out_folded(b, room, T::factor_parts);
            else lay_out_numbers(b, room);
            b.of_bias = room.floats(with_bias ? int64_t{its.slots} * its.stride : 0);
            b.part_stride = std::max(its.rows_in, its.rows_out) + 8;
            const int64_t parts = int64_t{2} * T::factor_parts * round_up(its.columns, 16) * b.part_stride;
            b.dz_parts = room.take(parts);
            b.v2_parts = room.take(its.dense ? 0 : parts);
            const int part = its.columns * b.part_stride;
            b.v2 = b.dz = w.v2 = w.dz = {nullptr, b.part_stride, part, int64_t{T::factor_parts} * part};
            b.places.clear_end = room.bytes;
            w.left_terms = share_of_terms(its.columns);
            w.right_terms = share_of_terms(its.right_terms);
            w.part_stride = b.part_stride;
            if (!add_slabs(b.places, its, with_bias ? its.right_terms : its.columns, T::factor_parts, T::factor_parts, room, limit,
                           least)) return false;
            if (its.dense) {  // between contraction and expansion, V2 has the place of the slabs
                const Images& images = b.places.images;
                const bool shared = !b.places.left.whole && 2 * std::max(images.left_slab, images.right2_slab) >= parts;
                b.v2_parts = shared ? b.places.left.at : room.take(parts);
                if (room.bytes > limit) return false;
            }
            // The second kernel has the same tiles.
            const int rows = std::max(its.rows_in, its.rows_out);
            for (const int slab : {128, 64, 32, 16}) {
                of_weights_room = {};
                w.slab = slab;
                w.ids = of_weights_room.take(tokens * 4);
                w.row_stride = row_bytes<T>(slab);
                w.rows = of_weights_room.take(int64_t{rows} * w.row_stride);
                const int terms = round_up(std::max(w.left_terms, w.right_terms), 16);
                w.parts = of_weights_room.take(int64_t{2} * T::factor_parts * terms * w.part_stride);
                w.parts_bytes = of_weights_room.bytes - w.parts;
                w.stage_bytes = of_weights_room.bytes;
                of_weights_room.take(w.stage_bytes);
                const int half = device.shared_per_multiprocessor / of_weights - reserved;
                if (of_weights_room.bytes <= (slab > 32 ? half : device.shared_limit)) return true;
            }
            return false;
        });
    });
    w.family = b.family;
    const Tiling& t = b.family.tiling;
    const FamilySizes sizes(b.family);
    w.wants_left = wanted.left;
    w.wants_right = wanted.right;
    const auto blocks_for = [&](int width, int all, int terms) {
        return ((width + w.slab - 1) / w.slab) * ((all + terms - 1) / terms);
    };
    w.slabs_in = blocks_for(b.family.middle.in, b.family.columns, w.left_terms);
    w.slabs_out = blocks_for(b.family.middle.out, b.family.right_terms, w.right_terms);
    const int units = w.slabs_in + w.slabs_out, most = std::max(t.most, 1);  // whatever is wanted, as a workspace must suffice
    const int computed = (wanted.left ? w.slabs_in : 0) + (wanted.right ? w.slabs_out : 0);
    b.partials = {nullptr, round_up(static_cast<int>(sizes.small()), 4), std::min(blocks_of(device, room.bytes, of_backward), most)};
    w.partials = {nullptr, (sizes.wide() + 3) / 4 * 4, std::clamp(blocks_of(device, of_weights_room.bytes, of_weights) / units, 1, most)};
    const int of_rows = with_element(problem.problem.dtype, [&](auto element) {
        return threads_of_rows<decltype(element)>(device.capability);
    });
    plan.rows_launch = {b.partials.programs, of_rows, room.bytes, nullptr, false};
    plan.weights_launch = {w.partials.programs * computed, threads, of_weights_room.bytes, nullptr, false};
    return plan;
}

namespace {

// Takes shared memory behind that of the launch.
Routed routed(const FamilyProblem& problem, Launch& launch) {
    const Projection& p = *problem.problem.down;
    const auto number = [](int64_t size) { return static_cast<int>(size); };
    const int note = launch.shared_bytes;
    launch.shared_bytes += 16;
    return {family(problem, pair_tokens).tiling, number(p.n_in * p.n_in * p.n_in), number(p.in), number(p.out),
            problem.bank->shared_rule_down, problem.bank->shared_rule_up, note};
}

}  // namespace

bool routed_pairs_serve(const FamilyProblem& p) {
    if (!p.bank || !p.bank->route || !p.bank->groups || !pairs_serve(p.problem)) return false;
    const auto aligned = [](const Parameters& w) {
        for (const Array& array : {w.rule, w.left, w.right, w.bias})
            if (reinterpret_cast<uintptr_t>(array.data) % 16) return false;
        return true;
    };
    return p.problem.tokens / p.bank->groups % pair_tokens == 0 && aligned(p.problem.down->weights) &&
           aligned(p.problem.up->weights);
}

RoutedPairForward plan_routed_pairs(const FamilyProblem& problem, const Device& device, Launch& launch) {
    const PlannedPairForward plan = plan_pair_forward(problem.problem, device);
    launch = plan.launch;
    return {plan.arguments, routed(problem, launch)};
}

bool plan_routed_backward(RoutedBackward& backward, const FamilyProblem& problem, const Device& device, Launch& launch) {
    if (!routed_pairs_serve(problem) || device.capability < 90 || device.capability >= 120) return false;
    const PlannedBackward plan = plan_backward(problem.problem, device);
    launch = plan.launch;
    backward = {plan.arguments, routed(problem, launch), plan.launch.blocks};
    return plan.arguments.kernel == BackwardKernel::folded && launch.shared_bytes <= device.shared_limit;
}

FamilyImages plan_images(const Family& f, const FamilyPlaces& places, Launch& launch) {
    constexpr int numbers = 4096;  // of a block
    const int64_t all = int64_t{f.columns} * f.middle.in + int64_t{f.right_terms} * f.middle.out;
    const int pieces = static_cast<int>((all + numbers - 1) / numbers);
    launch = {images_of(f) * pieces, threads, 0, nullptr, false};
    return {f, places, nullptr, pieces};
}

int images_of(const Family& f) { return f.mixed ? 1 : f.tiling.adapters; }

FamilyTable plan_table(const Tiling& tiling, const FamilyProblem& problem, const Device& device, Launch& launch) {
    FamilyTable table{tiling, problem.bank->route, nullptr, static_cast<int>(problem.bank->groups), 32};
    const auto bytes = [&] { return (int64_t{table.warps} * tiling.buckets() + 2 * (tiling.buckets() + 1)) * 4; };
    while (table.warps > 1 && bytes() > device.shared_limit) table.warps /= 2;
    launch = {1, 1024, static_cast<int>(std::min<int64_t>(bytes(), 1 << 30)), nullptr, false};
    return table;
}

}  // namespace compacter::cuda

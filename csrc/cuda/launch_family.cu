// The entry points of the kernels for the family.
#include <algorithm>

#include "launch.h"
#include "plan_family.h"

namespace compacter::cuda {
namespace {

constexpr int64_t widest = 1 << 20;
constexpr int64_t most_tokens = (int64_t{1} << 31) - 1024;  // an int holds the first row behind the last tile
constexpr int most_dense = 256, most_terms = 64, most_chunks = 64;

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

int64_t floats_of_images(const Family& f, const FamilyPlaces& places) { return images_of(f) * places.images.bytes / 4; }

// What the workspace of a backward holds, each part a multiple of four floats.
struct Workspace {
    int64_t table, images, v2, dz, grad_mix, small, wide, floats = 0;

    Workspace(const FamilyProblem& problem, const PlannedFamilyBackward& plan, const Wanted& wanted) {
        const Family& f = plan.rows.family;
        const int64_t tokens = problem.problem.tokens;
        const auto take = [&](bool needed, int64_t count) {
            const int64_t at = floats;
            if (needed) floats += (count + 3) / 4 * 4;
            return at;
        };
        const auto of_rows = [&](const Partials& p) { return p.rows(f.mixed, f.tiling.adapters) * p.row; };
        table = take(problem.bank && problem.bank->route, f.tiling.ints());
        images = take(true, floats_of_images(f, plan.rows.places));
        v2 = take(wanted.right, int64_t{f.tiling.most} * plan.rows.v2.tile / 2);
        dz = take(wanted.left, int64_t{f.tiling.most} * plan.rows.dz.tile / 2);
        grad_mix = take(wanted.mix, tokens * f.tiling.adapters);
        small = take(wanted.small, of_rows(plan.rows.partials));
        wide = take(wanted.left || wanted.right, of_rows(plan.weights.partials));
    }
};

// Makes the table of a routed bank in the workspace.
void make_table(const FamilyProblem& problem, Tiling& tiling, const Device& device, float* workspace, void* stream) {
    if (!problem.bank || !problem.bank->route) return;
    Launch launch{};
    FamilyTable table = plan_table(tiling, problem, device, launch);
    tiling.table = table.table = reinterpret_cast<int*>(workspace);
    launch.stream = stream;
    family_table_kernel(table, launch);
}

// Makes the images of the adapters there, for kernels with these places.
void make_images(const Family& family, FamilyPlaces& places, float* to, void* stream) {
    Launch launch{};
    FamilyImages images = plan_images(family, places, launch);
    images.to = reinterpret_cast<unsigned char*>(to);
    places.images.first = images.to;
    launch.stream = stream;
    family_images_kernel(images, launch);
}

// Where the images of a forward begin in its workspace.
int64_t behind_table(const FamilyProblem& problem, const Tiling& tiling) {
    return problem.bank && problem.bank->route ? (tiling.ints() + 3) / 4 * 4 : 0;
}

std::string text(int64_t number) { return std::to_string(number); }

std::string refuses(const FamilyProblem& problem, const Device& device) {
    const Projection &down = *problem.problem.down, &up = problem.problem.up ? *problem.problem.up : down;
    if (device.capability < 80) return "the device is older than sm_80";
    if (down.dense() && down.out > most_dense) return "the bottleneck has width " + text(down.out) + "; the kernels have at most 256";
    if (problem.problem.up && !down.dense()) {
        if (down.terms != down.n_in || down.n_in != down.n_out || up.terms != up.n_in || up.n_in != up.n_out)
            return "the rules of an adapter are not (phm_dim, phm_dim, phm_dim)";
        if (down.terms != up.terms || down.rank != up.rank)
            return "down has phm_dim " + text(down.terms) + " and rank " + text(down.rank) + ", up has " + text(up.terms) + " and " +
                   text(up.rank);
    }
    if (!down.dense() && down.terms * down.rank > most_terms)
        return text(down.terms) + " terms of rank " + text(down.rank) + " are above " + text(most_terms) + " in all";
    if (std::max(down.n_in, up.n_out) > most_chunks)
        return "a rule of " + text(down.n_in) + " x " + text(up.n_out) + " is above " + text(most_chunks) + " in a dimension";
    if (std::max({down.in, down.out, up.out}) > widest) return "a width is above " + text(widest);
    const PlannedFamilyForward forward = plan_family_forward(problem, device);
    const PlannedFamilyBackward backward = plan_family_backward(problem, device, {true, true, true, true, true});
    const int table = problem.bank && problem.bank->route ? (backward.rows.family.tiling.buckets() * 3 + 2) * 4 : 0;
    for (const auto& [name, bytes] :
         {std::pair("forward", forward.launch.shared_bytes), std::pair("backward", backward.rows_launch.shared_bytes),
          std::pair("the gradients of the weights", backward.weights_launch.shared_bytes), std::pair("the order of the rows", table)})
        if (bytes > device.shared_limit)
            return std::string(name) + " takes " + text(bytes) + " bytes of shared memory, the device has " +
                   text(device.shared_limit) + " for a block";
    return {};
}

void check_tokens(const FamilyProblem& problem) {
    if (problem.problem.tokens > most_tokens)
        throw std::runtime_error("x has " + text(problem.problem.tokens) + " rows; the kernels have at most " + text(most_tokens));
}

// Of many adapters each has the sums of few programs, and of one adapter all have some.
void launch_reduce(FamilyReduce& reduce, bool overlaps, void* stream) {
    constexpr int threads = 256;
    reduce.groups = reduce.family.tiling.adapters < 8 || reduce.family.mixed ? 8 : 1;
    const int width = threads / reduce.groups, blocks = (reduce.columns + width - 1) / width * reduce.family.tiling.adapters;
    family_reduce_kernel(reduce, {blocks, threads, threads * 4, stream, overlaps});
}

// The partials of the folded backward behind its table, whose rows have the gradients in the order of the parameters.
Partials partials_of(const RoutedBackward& folded, float* workspace) {
    return {workspace + (folded.routed.tiling.ints() + 3) / 4 * 4, folded.b.row, folded.programs};
}

void reduce_folded(const FamilyProblem& problem, const RoutedBackward& folded, const Partials& partials, Family family,
                   const Parameters& down, const Parameters& up, const Device& device, void* stream) {
    const Row row = row_of(problem.problem);
    FamilyReduce reduce{};
    for (const Parameters* side : {&down, &up})
        for (const Array* array : {&side->rule, &side->left, &side->right, &side->bias}) {
            const int j = reduce.count++;
            const bool shared = j == 0 ? family.shared_rule : j == 4 && family.shared_rule2;
            reduce.gradients[j] = {*array, row.begin[j + 1] - row.begin[j], row.begin[j], false, shared};
        }
    family.tiling = folded.routed.tiling;
    reduce.family = family;
    reduce.narrow = partials;
    reduce.columns = row.begin[row.count];
    launch_reduce(reduce, device.capability >= 90, stream);
}

void forward(const FamilyProblem& problem, const void* x, const void* residual, void* out, float* workspace, const Device& device,
             void* stream) {
    if (!problem.problem.tokens) return;
    check_tokens(problem);
    if (problem.bank && aligned(x) && aligned(residual) && aligned(out) && routed_pairs_serve(problem)) {
        Launch launch{};
        RoutedPairForward f = plan_routed_pairs(problem, device, launch);
        if (launch.shared_bytes <= device.shared_limit) {
            make_table(problem, f.routed.tiling, device, workspace, stream);
            f.f.x = x;
            f.f.residual = residual;
            f.f.out = out;
            launch.stream = stream;
            return routed_pair_forward_kernel(f, launch);
        }
    }
    PlannedFamilyForward plan = plan_family_forward(problem, device);
    FamilyForward& f = plan.arguments;
    make_table(problem, f.family.tiling, device, workspace, stream);
    make_images(f.family, f.places, workspace + behind_table(problem, f.family.tiling), stream);
    f.x = x;
    f.residual = residual;
    f.out = out;
    f.family.middle.in_vectors &= aligned(x);
    f.family.middle.out_vectors &= aligned(out) && aligned(residual);
    plan.launch.stream = stream;
    with_element(problem.problem.dtype, [&](auto element) { family_forward_kernel<decltype(element)>(f, plan.launch); });
}

void backward(const FamilyProblem& problem, const void* x, const void* grad_out, void* grad_x, bool residual_is_x,
              const Parameters& down, const Parameters& up, const Array& grad_mix, float* workspace, const Device& device,
              void* stream) {
    check_tokens(problem);
    const bool linear = !problem.problem.up, dense = problem.problem.down->dense();
    const Array &right2 = linear ? down.right : dense ? up.left : up.right, &bias2 = linear ? down.bias : up.bias;
    FamilyReduce reduce{};
    int64_t columns = 0;
    const auto add = [&](const Array& array, int begin, int size, bool wide, bool shared) {
        if (!array.data || !size) return false;
        reduce.gradients[reduce.count++] = {array, size, begin, wide, shared};
        columns += size;
        return true;
    };
    const bool tokens = problem.problem.tokens > 0;
    PlannedFamilyBackward plan = plan_family_backward(problem, device, {true, true, true, true, true});
    const FamilySizes sizes(plan.rows.family);
    Wanted wanted{};
    wanted.x = tokens && grad_x;
    wanted.mix = grad_mix.data != nullptr;
    wanted.left = add(down.left, 0, sizes.left, true, false);
    wanted.right = add(right2, sizes.left, sizes.right2, true, false);
    wanted.right |= add(bias2, sizes.left + sizes.right2, sizes.bias2, true, false);
    int begin = 0;
    const Family& sized = plan.rows.family;
    const auto add_small = [&](const Array& array, int size, bool shared) {
        wanted.small |= add(array, begin, size, false, shared);
        begin += size;
    };
    add_small(down.rule, sizes.rule, sized.shared_rule);
    add_small(linear ? Array{} : down.right, sizes.right, false);
    add_small(linear ? Array{} : down.bias, sizes.bias, false);
    add_small(linear ? Array{} : up.rule, sizes.rule2, sized.shared_rule2);
    add_small(linear || dense ? Array{} : up.left, sizes.left2, false);

    RoutedBackward folded{};
    Launch launch{};
    if (tokens && reduce.count && aligned(x) && aligned(grad_out) && aligned(grad_x) &&
        plan_routed_backward(folded, problem, device, launch)) {
        make_table(problem, folded.routed.tiling, device, workspace, stream);
        folded.b.x = x;
        folded.b.grad_out = grad_out;
        folded.b.grad_x = grad_x;
        folded.b.residual_is_x = residual_is_x;
        const Partials partials = partials_of(folded, workspace);
        folded.b.partials = partials.first;
        launch.stream = stream;
        routed_folded_backward_kernel(folded, launch);
        return reduce_folded(problem, folded, partials, plan.rows.family, down, up, device, stream);
    }
    plan = plan_family_backward(problem, device, wanted);
    FamilyBackward& b = plan.rows;
    FamilyWeights& w = plan.weights;
    const Workspace at(problem, plan, wanted);
    if (tokens) {
        make_table(problem, b.family.tiling, device, workspace + at.table, stream);
        make_images(b.family, b.places, workspace + at.images, stream);
        b.x = w.x = x;
        b.grad_out = w.grad_out = grad_out;
        b.grad_x = grad_x;
        b.residual_is_x = residual_is_x;
        b.v2.first = w.v2.first = wanted.right ? reinterpret_cast<uint16_t*>(workspace + at.v2) : nullptr;
        b.dz.first = w.dz.first = wanted.left ? reinterpret_cast<uint16_t*>(workspace + at.dz) : nullptr;
        b.grad_mix = wanted.mix ? workspace + at.grad_mix : nullptr;
        b.partials.first = wanted.small ? workspace + at.small : nullptr;
        w.partials.first = workspace + at.wide;
        b.family.middle.in_vectors &= aligned(x) && aligned(grad_x) && (!residual_is_x || aligned(grad_out));
        b.family.middle.out_vectors &= aligned(grad_out);
        w.family = b.family;
        plan.rows_launch.stream = plan.weights_launch.stream = stream;
        with_element(problem.problem.dtype, [&](auto element) {
            family_backward_kernel<decltype(element)>(b, plan.rows_launch);
            if (wanted.left || wanted.right) family_weights_kernel<decltype(element)>(w, plan.weights_launch);
        });
    }
    if (wanted.mix) {
        const int adapters = b.family.tiling.adapters, groups = static_cast<int>(problem.bank->groups);
        const MixReduce mix{b.grad_mix, grad_mix, adapters, b.family.tiling.group};
        if (groups) mix_reduce_kernel(mix, {groups * ((adapters + 31) / 32), 1024, 1024 * 4, stream, false});
    }
    if (!reduce.count) return;
    reduce.family = b.family;
    reduce.narrow = b.partials;
    reduce.wide = w.partials;
    reduce.columns = static_cast<int>(columns);
    launch_reduce(reduce, tokens && (wanted.left || wanted.right) && device.capability >= 90, stream);
}

int64_t workspace(const FamilyProblem& problem, bool weights, bool mix, const Device& device) {
    if (!problem.problem.tokens) return 0;
    const Wanted wanted{true, weights, weights, weights, mix};
    const int64_t floats = Workspace(problem, plan_family_backward(problem, device, wanted), wanted).floats;
    RoutedBackward folded{};
    Launch launch{};
    if (!weights || !plan_routed_backward(folded, problem, device, launch)) return floats;
    const Partials partials = partials_of(folded, nullptr);
    return std::max(floats, partials.first - static_cast<float*>(nullptr) + partials.rows(false, folded.routed.tiling.adapters) * partials.row);
}

int64_t forward_floats(const FamilyProblem& problem, const Device& device) {
    if (!problem.problem.tokens) return 0;
    const FamilyForward f = plan_family_forward(problem, device).arguments;
    const int64_t floats = behind_table(problem, f.family.tiling) + floats_of_images(f.family, f.places);
    if (!routed_pairs_serve(problem)) return floats;
    Launch launch{};
    return std::max(floats, plan_routed_pairs(problem, device, launch).routed.tiling.ints());
}

}  // namespace

std::string refuses_family(const Linear& l, const Device& device) { return refuses(family_of(l), device); }
std::string refuses_family(const Adapter& a, const Bank* bank, const Device& device) { return refuses(family_of(a, bank), device); }

int64_t forward_workspace(const Linear& l, const Device& device) { return forward_floats(family_of(l), device); }
int64_t forward_workspace(const Adapter& a, const Bank* bank, const Device& device) {
    return forward_floats(family_of(a, bank), device);
}
int64_t backward_workspace(const Linear& l, const Device& device) {
    return workspace(family_of(l), true, false, device);
}
int64_t backward_workspace(const Adapter& a, const Bank* bank, bool weights, bool mix, const Device& device) {
    return workspace(family_of(a, bank), weights, mix, device);
}

void forward_family(const Linear& l, const void* base, void* out, float* workspace, const Device& device, void* stream) {
    forward(family_of(l), l.x, base, out, workspace, device, stream);
}
void forward_family(const Adapter& a, const Bank* bank, const void* residual, void* out, float* workspace, const Device& device,
                    void* stream) {
    forward(family_of(a, bank), a.x, residual, out, workspace, device, stream);
}
void backward_family(const Linear& l, const void* grad_out, void* grad_x, const Parameters& gradients, float* workspace,
                     const Device& device, void* stream) {
    backward(family_of(l), l.x, grad_out, grad_x, false, gradients, {}, {}, workspace, device, stream);
}
void backward_family(const Adapter& a, const Bank* bank, const void* grad_out, void* grad_x, bool residual_is_x,
                     const Parameters& down_gradients, const Parameters& up_gradients, const Array& grad_mix, float* workspace,
                     const Device& device, void* stream) {
    backward(family_of(a, bank), a.x, grad_out, grad_x, residual_is_x, down_gradients, up_gradients, grad_mix, workspace, device,
             stream);
}

}  // namespace compacter::cuda

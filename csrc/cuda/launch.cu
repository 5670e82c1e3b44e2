#include "launch.h"

#include <algorithm>

#include "plan.h"

namespace compacter::cuda {
namespace {

// A row begins a multiple of its width after its tensor, so the tensor's alignment decides.
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
bool aligned(const Parameters& p) {
    return aligned(p.rule.data) && aligned(p.left.data) && aligned(p.right.data) && aligned(p.bias.data);
}

// Whether the sizes of a rule and its rank are compiled into the kernels for adapters and single projections of PHM.
bool known(int64_t n) { return n == 1 || n == 2 || n == 4 || n == 8 || n == 12 || n == 16; }
bool known_rank(int64_t rank) { return rank == 1 || rank == 2 || rank == 4; }
bool of_family(const Linear& l) {
    const Projection& p = l.projection;
    return p.terms != p.n_in || p.n_in != p.n_out || !known(p.terms) || !known_rank(p.rank);
}

std::string refuses(const Problem& p, const Device& device) {
    const Projection &down = *p.down, &up = p.up ? *p.up : down;
    const auto text = [](int64_t number) { return std::to_string(number); };
    const int64_t n = down.n_in, rank = down.rank;
    if (device.capability < 80) return "the device is older than sm_80";
    if (n != up.n_in || rank != up.rank)
        return "down has phm_dim " + text(n) + " and rank " + text(rank) + ", up has " + text(up.n_in) + " and " + text(up.rank);
    if (!known(n)) return "phm_dim is " + text(n) + "; the kernels have 1, 2, 4, 8, 12 and 16";
    if (!known_rank(rank)) return "the rank is " + text(rank) + "; the kernels have 1, 2 and 4";
    constexpr int64_t widest = 1 << 20;
    if (down.in > widest || down.out > widest || up.out > widest) return "a width is above " + text(widest);
    const int forward = plan_forward(p, device).launch.shared_bytes, backward = plan_backward(p, device, false).launch.shared_bytes;
    for (const auto& [name, bytes] : {std::pair("forward", forward), std::pair("backward", backward)})
        if (bytes > device.shared_limit)
            return std::string(name) + " takes " + text(bytes) + " bytes of shared memory, the device has " +
                   text(device.shared_limit) + " for a block";
    return {};
}

void forward(const Problem& p, const void* x, const void* residual, void* out, const Device& device, void* stream) {
    if (!p.tokens) return;
    const bool all_aligned = aligned(x) && aligned(residual) && aligned(out) && aligned(p.down->weights);
    if (all_aligned && pairs_serve(p) && aligned(p.up->weights)) {
        PlannedPairForward plan = plan_pair_forward(p, device);
        plan.arguments.x = x;
        plan.arguments.residual = residual;
        plan.arguments.out = out;
        plan.launch.stream = stream;
        if (plan.launch.shared_bytes <= device.shared_limit) return pair_forward_kernel(plan.arguments, plan.launch);
    }
    PlannedForward plan = plan_forward(p, device);
    Forward& f = plan.arguments;
    Launch& l = plan.launch;
    f.x = x;
    f.residual = residual;
    f.out = out;
    f.sizes.in_vectors &= aligned(x);
    f.sizes.out_vectors &= aligned(out) && aligned(residual);
    l.stream = stream;
    with_element(p.dtype, [&](auto element) { forward_kernel<decltype(element)>(f, l); });
}

void backward(const Problem& p, const void* x, const void* grad_out, void* grad_x, bool residual_is_x, const Parameters& down,
              const Parameters& up, float* workspace, const Device& device, void* stream) {
    const Row row = row_of(p);
    Reduce reduce{workspace, row.floats, 0, row.count, {}, {}};
    int at = 0;
    bool wanted = false;
    for (const Parameters* gradients : {&down, &up})
        for (const Array& gradient : {gradients->rule, gradients->left, gradients->right, gradients->bias})
            if (at < row.count) {
                reduce.gradient[at++] = gradient;
                wanted |= gradient.data != nullptr;
            }
    for (int j = 0; j <= row.count; ++j) reduce.begin[j] = row.begin[j];
    if (p.tokens) {
        const bool all_aligned = aligned(x) && aligned(grad_out) && aligned(grad_x) && aligned(p.down->weights);
        PlannedBackward plan = plan_backward(p, device, all_aligned && p.up && aligned(p.up->weights));
        Backward& b = plan.arguments;
        Launch& l = plan.launch;
        b.x = x;
        b.grad_out = grad_out;
        b.grad_x = grad_x;
        b.residual_is_x = residual_is_x;
        b.partials = workspace;
        b.sizes.in_vectors &= aligned(x) && aligned(grad_x);
        b.sizes.out_vectors &= aligned(grad_out);
        l.stream = stream;
        reduce.rows = l.blocks;
        switch (b.kernel) {
            case BackwardKernel::folded: folded_backward_kernel(b, l); break;
            case BackwardKernel::sides: sides_backward_kernel(b, l); break;
            case BackwardKernel::wide: wide_backward_kernel(b, l); break;
            case BackwardKernel::general:
                with_element(p.dtype, [&](auto element) { backward_kernel<decltype(element)>(b, l); });
        }
    }
    if (!wanted) return;
    const int blocks = (row.begin[row.count] + reduce_columns - 1) / reduce_columns;
    const bool overlaps = p.tokens && device.capability >= 90;
    reduce_kernel(reduce, {blocks, reduce_threads, reduce_threads * 4, stream, overlaps});
}

int64_t workspace(const Problem& p, const Device& device) {
    if (!p.tokens) return 0;
    const int blocks = std::max(plan_backward(p, device, false).launch.blocks, plan_backward(p, device, true).launch.blocks);
    return blocks * row_of(p).floats;
}

Division division(const Problem& p, const Device& device) {
    const PlannedBackward plan = plan_backward(p, device);
    return {plan.launch.blocks, plan.arguments.sizes.tokens, plan.arguments.stages};
}

}  // namespace

std::string refuses(const Linear& l, const Device& device) {
    return of_family(l) ? refuses_family(l, device) : refuses(problem_of(l), device);
}
std::string refuses(const Adapter& a, const Device& device) {
    return a.down.dense() ? refuses_family(a, nullptr, device) : refuses(problem_of(a), device);
}
int64_t workspace(const Linear& l, const Device& device) {
    return of_family(l) ? backward_workspace(l, device) : workspace(problem_of(l), device);
}
int64_t workspace(const Adapter& a, const Device& device) {
    return a.down.dense() ? backward_workspace(a, nullptr, true, false, device) : workspace(problem_of(a), device);
}
int64_t space_of_forward(const Linear& l, const Device& device) { return of_family(l) ? forward_workspace(l, device) : 0; }
int64_t space_of_forward(const Adapter& a, const Device& device) {
    return a.down.dense() ? forward_workspace(a, nullptr, device) : 0;
}
Division division(const Linear& l, const Device& device) { return division(problem_of(l), device); }
Division division(const Adapter& a, const Device& device) { return division(problem_of(a), device); }
Versions versions() { return {driver_version(), runtime_version()}; }

void forward(const Linear& l, const void* base, void* out, float* workspace, const Device& device, void* stream) {
    if (of_family(l)) return forward_family(l, base, out, workspace, device, stream);
    forward(problem_of(l), l.x, base, out, device, stream);
}
void forward(const Adapter& a, const void* residual, void* out, float* workspace, const Device& device, void* stream) {
    if (a.down.dense()) return forward_family(a, nullptr, residual, out, workspace, device, stream);
    forward(problem_of(a), a.x, residual, out, device, stream);
}
void backward(const Linear& l, const void* grad_out, void* grad_x, const Parameters& gradients, float* workspace,
              const Device& device, void* stream) {
    if (of_family(l)) return backward_family(l, grad_out, grad_x, gradients, workspace, device, stream);
    backward(problem_of(l), l.x, grad_out, grad_x, false, gradients, {}, workspace, device, stream);
}
void backward(const Adapter& a, const void* grad_out, void* grad_x, bool residual_is_x, const Parameters& down_gradients,
              const Parameters& up_gradients, float* workspace, const Device& device, void* stream) {
    if (a.down.dense())
        return backward_family(a, nullptr, grad_out, grad_x, residual_is_x, down_gradients, up_gradients, {}, workspace, device, stream);
    backward(problem_of(a), a.x, grad_out, grad_x, residual_is_x, down_gradients, up_gradients, workspace, device, stream);
}

}  // namespace compacter::cuda

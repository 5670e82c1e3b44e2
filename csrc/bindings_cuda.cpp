// CudaLinear, CudaAdapter and CudaBank of the CUDA target, if it was built. A launch keeps the interpreter's
// lock, since it is short. All addresses are on the current device, which must be that of the plan.
#include "bindings.h"

#ifdef COMPACTER_CUDA
#include "cuda/launch.h"
#endif

namespace compacter::bindings {

#ifdef COMPACTER_CUDA
namespace {

using cuda::Device;

// The kernels add either x or a residual.
void check_added(uintptr_t residual, bool add_x) {
    if (add_x && residual) throw std::invalid_argument("one of x and the residual can be added, not both");
}

std::array<int, 3> as_tuple(const cuda::Division& d) { return {d.blocks, d.tokens, d.stages}; }

// The last four arguments are the members of Device.
struct CudaLinear : LinearPlan {
    Device device;

    CudaLinear(int dtype, const Shape& shape, const std::array<int, 4>& dtypes, int multiprocessors, int shared_limit,
               int shared_per_multiprocessor, int capability)
        : LinearPlan(dtype, shape, dtypes),
          device{multiprocessors, shared_limit, shared_per_multiprocessor, capability} {}

    std::string refuses() const { return cuda::refuses(sizes(0), device); }
    int64_t forward_workspace(int64_t tokens) const { return cuda::space_of_forward(sizes(tokens), device); }
    int64_t workspace(int64_t tokens) const { return cuda::workspace(sizes(tokens), device); }
    auto division(int64_t tokens) const { return as_tuple(cuda::division(sizes(tokens), device)); }

    void forward(uintptr_t x, uintptr_t base, uintptr_t out, int64_t tokens, double scale, uintptr_t workspace,
                 uintptr_t stream, const py::tuple& parameters) const {
        Addresses addresses(parameters, 1);
        cuda::forward(at(x, tokens, addresses, scale), input(base), of_rows(out, tokens),
                      static_cast<float*>(output(workspace)), device, output(stream));
    }

    // parameters: those of the projection, then their gradients.
    void backward(uintptr_t x, uintptr_t grad_out, uintptr_t grad_x, int64_t tokens, double scale, uintptr_t workspace,
                  uintptr_t stream, const py::tuple& parameters) const {
        Addresses addresses(parameters, 2);
        const Linear linear = at(x, tokens, addresses, scale);
        cuda::backward(linear, of_rows(grad_out, tokens), output(grad_x), plan.gradients(addresses),
                       static_cast<float*>(output(workspace)), device, output(stream));
    }
};

struct CudaAdapter : AdapterPlan {
    Device device;

    CudaAdapter(int dtype, int activation, const Shape& down, const Shape& up, const std::array<int, 8>& dtypes,
                int multiprocessors, int shared_limit, int shared_per_multiprocessor, int capability)
        : AdapterPlan(dtype, activation, down, up, dtypes),
          device{multiprocessors, shared_limit, shared_per_multiprocessor, capability} {}

    std::string refuses() const { return cuda::refuses(sizes(0), device); }
    int64_t forward_workspace(int64_t tokens) const { return cuda::space_of_forward(sizes(tokens), device); }
    int64_t workspace(int64_t tokens) const { return cuda::workspace(sizes(tokens), device); }
    auto division(int64_t tokens) const { return as_tuple(cuda::division(sizes(tokens), device)); }

    void forward(uintptr_t x, uintptr_t residual, uintptr_t out, bool add_x, int64_t tokens, double scale,
                 uintptr_t workspace, uintptr_t stream, const py::tuple& parameters) const {
        check_added(residual, add_x);
        Addresses addresses(parameters, 2);
        cuda::forward(at(x, tokens, scale, addresses), input(added(x, residual, add_x)), of_rows(out, tokens),
                      static_cast<float*>(output(workspace)), device, output(stream));
    }

    void backward(uintptr_t x, uintptr_t grad_out, uintptr_t grad_x, bool add_x, int64_t tokens, double scale,
                  uintptr_t workspace, uintptr_t stream, const py::tuple& parameters) const {
        Addresses addresses(parameters, 4);
        const Adapter adapter = at(x, tokens, scale, addresses);
        const Parameters down_gradients = down.gradients(addresses), up_gradients = up.gradients(addresses);
        cuda::backward(adapter, of_rows(grad_out, tokens), output(grad_x), add_x, down_gradients, up_gradients,
                       static_cast<float*>(output(workspace)), device, output(stream));
    }
};

struct CudaBank : BankPlan {
    Device device;

    CudaBank(int dtype, int activation, const Shape& down, const Shape& up, const std::array<int, 8>& dtypes, int64_t count,
             bool shared_rule_down, bool shared_rule_up, int multiprocessors, int shared_limit, int shared_per_multiprocessor,
             int capability)
        : BankPlan(dtype, activation, down, up, dtypes, count, shared_rule_down, shared_rule_up),
          device{multiprocessors, shared_limit, shared_per_multiprocessor, capability} {}

    std::string refuses(bool mixed) const {
        const int64_t anywhere = 0;
        const Bank bank{count, shared_rule_down, shared_rule_up, 0, mixed ? nullptr : &anywhere, {}};
        return cuda::refuses_family(sizes(0), &bank, device);
    }
    int64_t forward_workspace(int64_t tokens, const Choice& choice) const {
        const Bank bank = chosen(choice, tokens);
        return cuda::forward_workspace(sizes(tokens), &bank, device);
    }
    // weights, mix: whether the gradients of the parameters, that of mix, are wanted.
    int64_t workspace(int64_t tokens, const Choice& choice, bool weights, bool mix) const {
        const Bank bank = chosen(choice, tokens);
        return cuda::backward_workspace(sizes(tokens), &bank, weights, mix, device);
    }

    void forward(uintptr_t x, uintptr_t residual, uintptr_t out, bool add_x, int64_t tokens, double scale,
                 const Choice& choice, uintptr_t workspace, uintptr_t stream, const py::tuple& parameters) const {
        check_added(residual, add_x);
        Addresses addresses(parameters, 2);
        const Bank bank = chosen(choice, tokens);
        cuda::forward_family(at(x, tokens, scale, addresses), &bank, input(added(x, residual, add_x)), of_rows(out, tokens),
                             static_cast<float*>(output(workspace)), device, output(stream));
    }

    // mix_gradient: memory for the gradient of mix, in its dtype, or 0.
    void backward(uintptr_t x, uintptr_t grad_out, uintptr_t grad_x, bool add_x, int64_t tokens, double scale,
                  const Choice& choice, uintptr_t mix_gradient, uintptr_t workspace, uintptr_t stream,
                  const py::tuple& parameters) const {
        Addresses addresses(parameters, 4);
        const Adapter adapter = at(x, tokens, scale, addresses);
        const Parameters down_gradients = down.gradients(addresses), up_gradients = up.gradients(addresses);
        const Bank bank = chosen(choice, tokens);
        cuda::backward_family(adapter, &bank, of_rows(grad_out, tokens), output(grad_x), add_x, down_gradients, up_gradients,
                              {output(mix_gradient), bank.mix.dtype}, static_cast<float*>(output(workspace)), device,
                              output(stream));
    }
};

template <class Plan>
py::class_<Plan>& with_methods(py::class_<Plan>& plan) {
    return plan.def("refuses", &Plan::refuses)
        .def("forward_workspace", &Plan::forward_workspace)
        .def("workspace", &Plan::workspace)
        .def("division", &Plan::division)
        .def("forward", &Plan::forward)
        .def("backward", &Plan::backward);
}

}  // namespace

void add_cuda(py::module_& module) {
    py::class_<CudaLinear> linear(module, "CudaLinear", py::module_local());
    with_methods(linear.def(py::init<int, const Shape&, const std::array<int, 4>&, int, int, int, int>()));
    py::class_<CudaAdapter> adapter(module, "CudaAdapter", py::module_local());
    with_methods(adapter.def(
        py::init<int, int, const Shape&, const Shape&, const std::array<int, 8>&, int, int, int, int>()));
    py::class_<CudaBank>(module, "CudaBank", py::module_local())
        .def(py::init<int, int, const Shape&, const Shape&, const std::array<int, 8>&, int64_t, bool, bool, int, int, int, int>())
        .def("refuses", &CudaBank::refuses)
        .def("forward_workspace", &CudaBank::forward_workspace)
        .def("workspace", &CudaBank::workspace)
        .def("forward", &CudaBank::forward)
        .def("backward", &CudaBank::backward);
    module.def("cuda_versions", [] {
        const cuda::Versions v = cuda::versions();
        return std::array<int, 2>{v.driver, v.runtime};
    });
}
#else
void add_cuda(py::module_&) {}
#endif

// cuda: true, false or "on the CPU". cuda_archs: the compiled compute capabilities, 10 * major +
// minor; the last exists as PTX too. cuda_missing: why it was not built.
void describe_cuda(py::dict& info) {
    py::list archs;
#if defined(COMPACTER_CUDA_ON_CPU)
    info["cuda"] = "on the CPU";
#elif defined(COMPACTER_CUDA)
    info["cuda"] = true;
    for (const auto arch : py::str(COMPACTER_CUDA_ARCHS).attr("split")()) archs.append(py::str("sm_") + arch);
#else
    info["cuda"] = false;
    info["cuda_missing"] = COMPACTER_NO_CUDA;
#endif
    info["cuda_archs"] = archs;
}

}  // namespace compacter::bindings

// Linear, Adapter and Bank of the CPU target. A call releases the interpreter's lock.
#include "bindings.h"
#include "cpu/isa.h"
#include "cpu/launch.h"

namespace compacter::bindings {
namespace {

struct CpuLinear : LinearPlan {
    using LinearPlan::LinearPlan;

    void forward(uintptr_t x, uintptr_t base, uintptr_t out, int64_t tokens, double scale, int threads,
                 const py::tuple& parameters) const {
        Addresses addresses(parameters, 1);
        const Linear linear = at(x, tokens, addresses, scale);
        void* const result = of_rows(out, tokens);
        py::gil_scoped_release release;
        cpu::forward(linear, input(base), result, threads);
    }

    // parameters: those of the projection, then their gradients.
    void backward(uintptr_t x, uintptr_t grad_out, uintptr_t grad_x, int64_t tokens, double scale, int threads,
                  const py::tuple& parameters) const {
        Addresses addresses(parameters, 2);
        const Linear linear = at(x, tokens, addresses, scale);
        const Parameters gradients = plan.gradients(addresses);
        const void* const grad = of_rows(grad_out, tokens);
        py::gil_scoped_release release;
        cpu::backward(linear, grad, output(grad_x), gradients, threads);
    }
};

struct CpuAdapter : AdapterPlan {
    using AdapterPlan::AdapterPlan;

    void forward(uintptr_t x, uintptr_t residual, uintptr_t out, bool add_x, int64_t tokens, double scale, int threads,
                 const py::tuple& parameters) const {
        run_forward(x, residual, out, add_x, tokens, scale, threads, parameters, nullptr);
    }

    void backward(uintptr_t x, uintptr_t grad_out, uintptr_t grad_x, bool add_x, int64_t tokens, double scale,
                  int threads, const py::tuple& parameters) const {
        run_backward(x, grad_out, grad_x, add_x, tokens, scale, threads, parameters, nullptr);
    }

    using Three = std::tuple<uintptr_t, uintptr_t, uintptr_t>;

    // of_norm: weight and bias in the dtype of x, and memory for the input of the norm.
    void forward_normed(uintptr_t x, uintptr_t residual, uintptr_t out, bool add_x, int64_t tokens, double scale,
                        const Three& of_norm, double eps, int threads, const py::tuple& parameters) const {
        const auto [weight, bias, rows] = of_norm;
        const LayerNorm norm{{of_rows(weight, 1), dtype}, {of_rows(bias, 1), dtype}, static_cast<float>(eps),
                             of_rows(rows, tokens), nullptr};
        run_forward(x, residual, out, add_x, tokens, scale, threads, parameters, &norm);
    }

    // of_norm: weight, the input of the norm, and memory for its gradient.
    void backward_normed(uintptr_t x, uintptr_t grad_out, uintptr_t grad_x, bool add_x, int64_t tokens, double scale,
                         const Three& of_norm, double eps, int threads, const py::tuple& parameters) const {
        const auto [weight, rows, grad_rows] = of_norm;
        const LayerNorm norm{{of_rows(weight, 1), dtype}, {}, static_cast<float>(eps), of_rows(rows, tokens),
                             of_rows(grad_rows, tokens)};
        run_backward(x, grad_out, grad_x, add_x, tokens, scale, threads, parameters, &norm);
    }

  private:
    void run_forward(uintptr_t x, uintptr_t residual, uintptr_t out, bool add_x, int64_t tokens, double scale, int threads,
                     const py::tuple& parameters, const LayerNorm* norm) const {
        Addresses addresses(parameters, 2);
        const Adapter adapter = at(x, tokens, scale, addresses);
        void* const result = of_rows(out, tokens);
        py::gil_scoped_release release;
        cpu::forward(adapter, input(added(x, residual, add_x)), add_x && residual, result, threads, norm);
    }

    void run_backward(uintptr_t x, uintptr_t grad_out, uintptr_t grad_x, bool add_x, int64_t tokens, double scale,
                      int threads, const py::tuple& parameters, const LayerNorm* norm) const {
        Addresses addresses(parameters, 4);
        const Adapter adapter = at(x, tokens, scale, addresses);
        const Parameters down_gradients = down.gradients(addresses), up_gradients = up.gradients(addresses);
        const void* const grad = of_rows(grad_out, tokens);
        py::gil_scoped_release release;
        cpu::backward(adapter, grad, output(grad_x), add_x, down_gradients, up_gradients, threads, norm);
    }
};

struct CpuBank : BankPlan {
    using BankPlan::BankPlan;

    void forward(uintptr_t x, uintptr_t residual, uintptr_t out, bool add_x, int64_t tokens, double scale,
                 const Choice& choice, int threads, const py::tuple& parameters) const {
        Addresses addresses(parameters, 2);
        const Adapter adapter = at(x, tokens, scale, addresses);
        const Bank bank = chosen(choice, tokens);
        void* const result = of_rows(out, tokens);
        const void* const first = input(added(x, residual, add_x));
        py::gil_scoped_release release;
        (bank.route ? cpu::forward_routed : cpu::forward_mixed)(adapter, bank, first, add_x && residual, result, threads);
    }

    // mix_gradient: memory for the gradient of mix, in its dtype, or 0.
    void backward(uintptr_t x, uintptr_t grad_out, uintptr_t grad_x, bool add_x, int64_t tokens, double scale,
                  const Choice& choice, uintptr_t mix_gradient, int threads, const py::tuple& parameters) const {
        Addresses addresses(parameters, 4);
        const Adapter adapter = at(x, tokens, scale, addresses);
        const Parameters down_gradients = down.gradients(addresses), up_gradients = up.gradients(addresses);
        const Bank bank = chosen(choice, tokens);
        const void* const grad = of_rows(grad_out, tokens);
        py::gil_scoped_release release;
        if (bank.route)
            cpu::backward_routed(adapter, bank, grad, output(grad_x), add_x, down_gradients, up_gradients, threads);
        else
            cpu::backward_mixed(adapter, bank, grad, output(grad_x), add_x, down_gradients, up_gradients,
                                {output(mix_gradient), bank.mix.dtype}, threads);
    }
};

}  // namespace

void describe_cpu(py::dict& info) {
    info["isa"] = cpu::compiled_isas();
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
}

void add_cpu(py::module_& module) {
    module.def("isa", [] { return std::string(cpu::kernels().isa); });
    module.def("set_isa", &cpu::set_isa, py::arg("name"));
    py::class_<CpuLinear>(module, "Linear", py::module_local())
        .def(py::init<int, const Shape&, const std::array<int, 4>&>())
        .def("forward", &CpuLinear::forward)
        .def("backward", &CpuLinear::backward);
    py::class_<CpuAdapter>(module, "Adapter", py::module_local())
        .def(py::init<int, int, const Shape&, const Shape&, const std::array<int, 8>&>())
        .def("forward", &CpuAdapter::forward)
        .def("backward", &CpuAdapter::backward)
        .def("forward_normed", &CpuAdapter::forward_normed)
        .def("backward_normed", &CpuAdapter::backward_normed);
    py::class_<CpuBank>(module, "Bank", py::module_local())
        .def(py::init<int, int, const Shape&, const Shape&, const std::array<int, 8>&, int64_t, bool, bool>())
        .def("forward", &CpuBank::forward)
        .def("backward", &CpuBank::backward);
}

}  // namespace compacter::bindings

// Linear and Adapter: the CPU target. A call gives the interpreter's lock back.
#include "bindings.h"
#include "cpu/isa.h"
#include "cpu/launch.h"

namespace compacter::bindings {
namespace {

struct CpuLinear : LinearPlan {
    using LinearPlan::LinearPlan;

    void forward(uintptr_t x, uintptr_t out, int64_t tokens, int threads, const py::list& parameters) const {
        Addresses addresses(parameters, 1);
        const Linear linear = at(x, tokens, addresses);
        py::gil_scoped_release release;
        cpu::forward(linear, output(out), threads);
    }

    // parameters, then their gradients
    void backward(uintptr_t x, uintptr_t grad_out, uintptr_t grad_x, int64_t tokens, int threads,
                  const py::list& parameters) const {
        Addresses addresses(parameters, 2);
        const Linear linear = at(x, tokens, addresses);
        const Parameters gradients = plan.at(addresses);
        py::gil_scoped_release release;
        cpu::backward(linear, input(grad_out), output(grad_x), gradients, threads);
    }
};

struct CpuAdapter : AdapterPlan {
    using AdapterPlan::AdapterPlan;

    void forward(uintptr_t x, uintptr_t residual, uintptr_t out, int64_t tokens, double scale, bool also_x, int threads,
                 const py::list& parameters) const {
        Addresses addresses(parameters, 2);
        const Adapter adapter = at(x, tokens, scale, addresses);
        py::gil_scoped_release release;
        cpu::forward(adapter, input(residual), also_x, output(out), threads);
    }

    void backward(uintptr_t x, uintptr_t grad_out, uintptr_t grad_x, bool residual_is_x, int64_t tokens, double scale,
                  int threads, const py::list& parameters) const {
        Addresses addresses(parameters, 4);
        const Adapter adapter = at(x, tokens, scale, addresses);
        const Parameters down_gradients = down.at(addresses), up_gradients = up.at(addresses);
        py::gil_scoped_release release;
        cpu::backward(adapter, input(grad_out), output(grad_x), residual_is_x, down_gradients, up_gradients, threads);
    }

    // With x and another residual, and a layer norm behind them whose weight and bias have the dtype of x.
    void forward_normed(uintptr_t x, uintptr_t residual, uintptr_t y, uintptr_t out, int64_t tokens, double scale,
                        uintptr_t weight, uintptr_t bias, double eps, int threads, const py::list& parameters) const {
        Addresses addresses(parameters, 2);
        const Adapter adapter = at(x, tokens, scale, addresses);
        const LayerNorm norm{{output(weight), dtype}, {output(bias), dtype}, static_cast<float>(eps), output(y), nullptr};
        py::gil_scoped_release release;
        cpu::forward(adapter, input(residual), true, output(out), threads, &norm);
    }

    void backward_normed(uintptr_t x, uintptr_t y, uintptr_t grad_out, uintptr_t grad_y, uintptr_t grad_x, int64_t tokens,
                         double scale, uintptr_t weight, double eps, int threads, const py::list& parameters) const {
        Addresses addresses(parameters, 4);
        const Adapter adapter = at(x, tokens, scale, addresses);
        const LayerNorm norm{{output(weight), dtype}, {}, static_cast<float>(eps), output(y), output(grad_y)};
        const Parameters down_gradients = down.at(addresses), up_gradients = up.at(addresses);
        py::gil_scoped_release release;
        cpu::backward(adapter, input(grad_out), output(grad_x), true, down_gradients, up_gradients, threads, &norm);
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
}

}  // namespace compacter::bindings

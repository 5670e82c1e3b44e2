// compacter_kernels._C: launch plans, built once for a shape and its dtypes, and called with addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "cpu/isa.h"
#include "cpu/launch.h"

namespace py = pybind11;

namespace {

using compacter::Activation;
using compacter::DType;
using compacter::Parameters;
using compacter::Projection;

using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, bool>;  // n, rank, in, out, has_bias
using DTypes = std::array<int, 4>;                                    // rule, left, right, bias

DType dtype_of(int code) {
    if (code < 0 || code > static_cast<int>(DType::f64))
        throw std::invalid_argument("dtype " + std::to_string(code) + " is unknown; 0 is f32, 1 bf16, 2 f16, 3 f64");
    return static_cast<DType>(code);
}

DType input_dtype_of(int code) {
    if (dtype_of(code) == DType::f64) throw std::invalid_argument("x in f64 is not served; choose f32, bf16 or f16");
    return dtype_of(code);
}

Activation activation_of(int code) {
    if (code < 0 || code > static_cast<int>(Activation::quick_gelu))
        throw std::invalid_argument("activation " + std::to_string(code) + " is unknown; choose 0 to 10");
    return static_cast<Activation>(code);
}

// A projection with the dtypes of its parameters, waiting for their addresses.
struct Plan {
    Projection projection;
    bool has_bias;

    Plan(const Shape& shape, const DTypes& dtypes) {
        const auto [n, rank, in, out, bias] = shape;
        if (n < 1 || rank < 1 || in < 1 || out < 1 || in % n || out % n)
            throw std::invalid_argument("n=" + std::to_string(n) + " and rank=" + std::to_string(rank) +
                                        " must be positive, and n must divide in=" + std::to_string(in) +
                                        " and out=" + std::to_string(out));
        projection = {n, rank, in, out, {}};
        has_bias = bias;
        Parameters& w = projection.weights;
        w.rule.dtype = dtype_of(dtypes[0]);
        w.left.dtype = dtype_of(dtypes[1]);
        w.right.dtype = dtype_of(dtypes[2]);
        if (has_bias) w.bias.dtype = dtype_of(dtypes[3]);
    }

    Parameters at(uintptr_t rule, uintptr_t left, uintptr_t right, uintptr_t bias) const {
        Parameters w = projection.weights;
        w.rule.data = reinterpret_cast<void*>(rule);
        w.left.data = reinterpret_cast<void*>(left);
        w.right.data = reinterpret_cast<void*>(right);
        w.bias.data = has_bias ? reinterpret_cast<void*>(bias) : nullptr;
        return w;
    }

    Projection with(uintptr_t rule, uintptr_t left, uintptr_t right, uintptr_t bias) const {
        Projection p = projection;
        p.weights = at(rule, left, right, bias);
        return p;
    }
};

const void* input(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* output(uintptr_t address) { return reinterpret_cast<void*>(address); }

struct LinearPlan {
    DType dtype;
    Plan plan;

    LinearPlan(int dtype, const Shape& shape, const DTypes& dtypes) : dtype(input_dtype_of(dtype)), plan(shape, dtypes) {}

    void forward(uintptr_t x, uintptr_t out, int64_t tokens, int threads, uintptr_t rule, uintptr_t left, uintptr_t right,
                 uintptr_t bias) const {
        compacter::cpu::forward({plan.with(rule, left, right, bias), dtype, tokens, input(x)}, output(out), threads);
    }

    void backward(uintptr_t x, uintptr_t grad_out, uintptr_t grad_x, int64_t tokens, int threads, uintptr_t rule,
                  uintptr_t left, uintptr_t right, uintptr_t bias, uintptr_t d_rule, uintptr_t d_left, uintptr_t d_right,
                  uintptr_t d_bias) const {
        compacter::cpu::backward({plan.with(rule, left, right, bias), dtype, tokens, input(x)}, input(grad_out),
                                 output(grad_x), plan.at(d_rule, d_left, d_right, d_bias), threads);
    }
};

struct AdapterPlan {
    DType dtype;
    Activation activation;
    Plan down, up;

    AdapterPlan(int dtype, int activation, const Shape& down, const Shape& up,
                const std::array<int, 8>& dtypes)
        : dtype(input_dtype_of(dtype)),
          activation(activation_of(activation)),
          down(down, {dtypes[0], dtypes[1], dtypes[2], dtypes[3]}),
          up(up, {dtypes[4], dtypes[5], dtypes[6], dtypes[7]}) {
        if (this->down.projection.out != this->up.projection.in || this->down.projection.in != this->up.projection.out)
            throw std::invalid_argument("down must be k -> d and up d -> k");
    }

    void forward(uintptr_t x, uintptr_t residual, uintptr_t out, int64_t tokens, double scale, int threads, uintptr_t rule1,
                 uintptr_t left1, uintptr_t right1, uintptr_t bias1, uintptr_t rule2, uintptr_t left2, uintptr_t right2,
                 uintptr_t bias2) const {
        compacter::cpu::forward({down.with(rule1, left1, right1, bias1), up.with(rule2, left2, right2, bias2), activation,
                                 static_cast<float>(scale), dtype, tokens, input(x)},
                                input(residual), output(out), threads);
    }

    void backward(uintptr_t x, uintptr_t grad_out, uintptr_t grad_x, bool residual_is_x, int64_t tokens, double scale,
                  int threads, uintptr_t rule1, uintptr_t left1, uintptr_t right1, uintptr_t bias1, uintptr_t rule2,
                  uintptr_t left2, uintptr_t right2, uintptr_t bias2, uintptr_t d_rule1, uintptr_t d_left1,
                  uintptr_t d_right1, uintptr_t d_bias1, uintptr_t d_rule2, uintptr_t d_left2, uintptr_t d_right2,
                  uintptr_t d_bias2) const {
        compacter::cpu::backward({down.with(rule1, left1, right1, bias1), up.with(rule2, left2, right2, bias2), activation,
                                  static_cast<float>(scale), dtype, tokens, input(x)},
                                 input(grad_out), output(grad_x), residual_is_x,
                                 down.at(d_rule1, d_left1, d_right1, d_bias1), up.at(d_rule2, d_left2, d_right2, d_bias2),
                                 threads);
    }
};

py::dict build_info() {
    py::dict info;
    info["isa"] = compacter::cpu::compiled_isas();
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    info["compiler"] = COMPACTER_COMPILER;
    info["cuda_archs"] = py::list();
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    using release = py::call_guard<py::gil_scoped_release>;
    module.def("build_info", &build_info);
    module.def("isa", [] { return std::string(compacter::cpu::kernels().isa); });
    module.def("set_isa", &compacter::cpu::set_isa, py::arg("name"));
    py::class_<LinearPlan>(module, "Linear")
        .def(py::init<int, const Shape&, const DTypes&>())
        .def("forward", &LinearPlan::forward, release())
        .def("backward", &LinearPlan::backward, release());
    py::class_<AdapterPlan>(module, "Adapter")
        .def(py::init<int, int, const Shape&, const Shape&, const std::array<int, 8>&>())
        .def("forward", &AdapterPlan::forward, release())
        .def("backward", &AdapterPlan::backward, release());
}

// The plans that all bindings share: built once for shapes and dtypes, and called with addresses.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "adapter.h"

namespace compacter::bindings {

namespace py = pybind11;

// terms, n_in, n_out, rank, in, out, has_bias, transposed
using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool>;

inline DType dtype_of(int code) {
    if (code < 0 || code > static_cast<int>(DType::f64))
        throw std::invalid_argument("dtype " + std::to_string(code) + " is unknown; 0 is f32, 1 bf16, 2 f16, 3 f64");
    return static_cast<DType>(code);
}

inline DType input_dtype_of(int code) {
    if (dtype_of(code) == DType::f64) throw std::invalid_argument("x in f64 is not served; choose f32, bf16 or f16");
    return dtype_of(code);
}

inline Activation activation_of(int code) {
    if (code < 0 || code >= activations)
        throw std::invalid_argument("activation " + std::to_string(code) + " is unknown; choose 0 to " +
                                    std::to_string(activations - 1));
    return static_cast<Activation>(code);
}

inline const void* input(uintptr_t address) { return reinterpret_cast<const void*>(address); }
inline void* output(uintptr_t address) { return reinterpret_cast<void*>(address); }

// The address of a tensor, which may be 0 only if the tensor has no rows.
inline void* of_rows(uintptr_t address, int64_t rows) {
    if (!address && rows) throw std::invalid_argument("a tensor of the call has no memory: its address is 0");
    return output(address);
}

// The tensor that is added first: the residual, or else x if it is added.
inline uintptr_t added(uintptr_t x, uintptr_t residual, bool add_x) { return !residual && add_x ? x : residual; }

// The last tuple of a call: addresses of rule, left, right, bias of each projection, 0 if absent.
class Addresses {
  public:
    Addresses(const py::tuple& given, size_t projections) : given_(given) {
        if (given.size() != 4 * projections)
            throw std::invalid_argument(std::to_string(4 * projections) + " addresses of parameters are needed, got " +
                                        std::to_string(given.size()));
    }
    void* next() {
        void* const address = PyLong_AsVoidPtr(PyTuple_GET_ITEM(given_.ptr(), taken_++));
        if (address == nullptr && PyErr_Occurred()) throw py::error_already_set();
        return address;
    }

  private:
    const py::tuple& given_;
    Py_ssize_t taken_ = 0;
};

// A projection with the dtypes of its parameters, without their addresses.
struct ProjectionPlan {
    Projection projection;
    bool has_bias;

    ProjectionPlan(const Shape& shape, const int* dtypes) {
        const auto [terms, n_in, n_out, rank, in, out, bias, transposed] = shape;
        const bool dense = terms == 0 && rank == 0 && n_in == 1 && n_out == 1;
        if ((!dense && (terms < 1 || rank < 1)) || n_in < 1 || n_out < 1 || in < 1 || out < 1 || in % n_in || out % n_out)
            throw std::invalid_argument("terms=" + std::to_string(terms) + " and rank=" + std::to_string(rank) +
                                        " must be positive, or both 0 with one chunk, n_in=" + std::to_string(n_in) +
                                        " must divide in=" + std::to_string(in) + " and n_out=" + std::to_string(n_out) +
                                        " must divide out=" + std::to_string(out));
        projection = {terms, n_in, n_out, rank, in, out, transposed, {}};
        has_bias = bias;
        Parameters& w = projection.weights;
        w.rule.dtype = dtype_of(dtypes[0]);
        w.left.dtype = dtype_of(dtypes[1]);
        w.right.dtype = dtype_of(dtypes[2]);
        if (has_bias) w.bias.dtype = dtype_of(dtypes[3]);
    }

    Parameters gradients(Addresses& addresses) const {
        Parameters w = projection.weights;
        for (Array* array : {&w.rule, &w.left, &w.right, &w.bias}) array->data = addresses.next();
        if (!has_bias) w.bias.data = nullptr;
        return w;
    }

    // The projection without memory. Of its parameters a plan asks only whether there is a bias.
    Projection sizes() const {
        static char anywhere;
        Projection p = projection;
        if (has_bias) p.weights.bias.data = &anywhere;
        return p;
    }

    Projection with(Addresses& addresses) const {
        Projection p = projection;
        p.weights = gradients(addresses);
        const Parameters& w = p.weights;
        if (!w.left.data || (!p.dense() && (!w.rule.data || !w.right.data)) || (has_bias && !w.bias.data))
            throw std::invalid_argument("a parameter has no memory: its address is 0");
        return p;
    }
};

struct LinearPlan {
    DType dtype;
    ProjectionPlan plan;

    LinearPlan(int dtype, const Shape& shape, const std::array<int, 4>& dtypes)
        : dtype(input_dtype_of(dtype)), plan(shape, dtypes.data()) {
        if (plan.projection.dense()) throw std::invalid_argument("a dense projection alone has no kernel");
    }

    Linear at(uintptr_t x, int64_t tokens, Addresses& addresses, double scale = 1.) const {
        return {plan.with(addresses), dtype, tokens, of_rows(x, tokens), static_cast<float>(scale)};
    }

    // The problem without addresses, for functions that depend on sizes alone.
    Linear sizes(int64_t tokens) const { return {plan.sizes(), dtype, tokens, nullptr}; }
};

struct AdapterPlan {
    DType dtype;
    Activation activation;
    ProjectionPlan down, up;

    AdapterPlan(int dtype, int activation, const Shape& down, const Shape& up, const std::array<int, 8>& dtypes)
        : dtype(input_dtype_of(dtype)),
          activation(activation_of(activation)),
          down(down, dtypes.data()),
          up(up, dtypes.data() + 4) {
        if (this->down.projection.out != this->up.projection.in || this->down.projection.in != this->up.projection.out)
            throw std::invalid_argument("down must be k -> d and up d -> k");
        if (this->down.projection.dense() != this->up.projection.dense())
            throw std::invalid_argument("down and up must both be dense, or neither");
    }

    Adapter at(uintptr_t x, int64_t tokens, double scale, Addresses& addresses) const {
        return {down.with(addresses), up.with(addresses), activation, static_cast<float>(scale), dtype, tokens,
                of_rows(x, tokens)};
    }

    Adapter sizes(int64_t tokens) const {
        return {down.sizes(), up.sizes(), activation, 1.f, dtype, tokens, nullptr};
    }
};

// A bank of `count` adapters, whose parameters lie one behind the other.
struct BankPlan : AdapterPlan {
    // groups, address of route or 0, address of mix or 0, dtype of mix
    using Choice = std::tuple<int64_t, uintptr_t, uintptr_t, int>;

    int64_t count;
    bool shared_rule_down, shared_rule_up;

    BankPlan(int dtype, int activation, const Shape& down, const Shape& up, const std::array<int, 8>& dtypes, int64_t count,
             bool shared_rule_down, bool shared_rule_up)
        : AdapterPlan(dtype, activation, down, up, dtypes),
          count(count),
          shared_rule_down(shared_rule_down),
          shared_rule_up(shared_rule_up) {
        if (count < 1) throw std::invalid_argument("a bank must have an adapter");
    }

    Bank chosen(const Choice& choice, int64_t tokens) const {
        const auto [groups, route, mix, dtype] = choice;
        if (groups < 0 || (groups ? tokens % groups != 0 : tokens != 0))
            throw std::invalid_argument(std::to_string(groups) + " groups do not divide " + std::to_string(tokens) + " rows");
        if (groups && !route && !mix) throw std::invalid_argument("route or mix has no memory: its address is 0");
        const auto* ids = static_cast<const int64_t*>(input(route));
        return {count, shared_rule_down, shared_rule_up, groups, ids, {output(mix), dtype_of(dtype)}};
    }
};

// add_* define the classes of a target, describe_* its entries in build_info().
void add_cpu(py::module_& module);
void add_cuda(py::module_& module);
void add_tensors(py::module_& module);
void describe_cpu(py::dict& info);
void describe_cuda(py::dict& info);

}  // namespace compacter::bindings

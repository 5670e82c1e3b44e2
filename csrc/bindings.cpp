// compacter_kernels._C: the launch plans of each target, and a description of the build.
#include "bindings.h"

namespace compacter::bindings {
namespace {

py::dict build_info() {
    py::dict info;
    info["compiler"] = COMPACTER_COMPILER;
    describe_cpu(info);
    describe_cuda(info);
    return info;
}

}  // namespace
}  // namespace compacter::bindings

PYBIND11_MODULE(_C, module) {
    using namespace compacter::bindings;
    module.def("build_info", &build_info);
    add_cpu(module);
    add_cuda(module);
    add_tensors(module);
}

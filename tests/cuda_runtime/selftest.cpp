// csrc/cuda/runtime.h over the stand-in for the CUDA runtime.
#include "../../csrc/cuda/runtime.h"

#include <cstdio>
#include <cstdlib>

using compacter::cuda::Launch;

namespace {

void expect(bool holds, const char* what) {
    if (holds) return;
    std::printf("%s\n", what);
    std::exit(1);
}

void kernel(int) {}
void another(int) {}

void launch(void (*f)(int), int bytes) { compacter::cuda::launch(f, Launch{1, 32, bytes, nullptr, false}, 0); }

const void* address(void (*f)(int)) { return reinterpret_cast<const void*>(f); }

}  // namespace

int main() {
    launch(kernel, 48 * 1024);
    expect(attributes_set == 0, "a small block needs no attribute");
    for (const int bytes : {100000, 60000, 200000, 232448}) {
        launch(kernel, bytes);
        expect(attributes[{address(kernel), 0}][cudaFuncAttributeMaxDynamicSharedMemorySize] == limits[0],
               "no launch lowers what another may take");
    }
    expect(attributes_set == 2, "the attributes are set once");
    expect(attributes[{address(kernel), 0}][cudaFuncAttributePreferredSharedMemoryCarveout] == 100,
           "shared memory before cache");
    launch(another, 232448);
    current_device = 1;
    launch(kernel, 100000);
    expect(attributes[{address(kernel), 1}][cudaFuncAttributeMaxDynamicSharedMemorySize] == limits[1],
           "each device has its own limit");
    expect(attributes_set == 6, "each kernel and device has its attributes");
    try {
        launch(kernel, 232448);
        expect(false, "a launch beyond the limit fails");
    } catch (const std::runtime_error& error) {
        expect(std::string(error.what()) == "launch of a kernel: invalid argument", error.what());
    }
    expect(compacter::cuda::driver_version() == 12040 && compacter::cuda::runtime_version() == 13000, "versions");
}

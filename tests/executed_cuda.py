"""impl="cuda" on the CPU: the kernels' sources, compiled as C++ and executed by tests/cuda_on_cpu.

    cmake -S . -B build/cuda_on_cpu -G Ninja -DCOMPACTER_CUDA_ON_CPU=ON
    cmake --build build/cuda_on_cpu
    CUDA_ON_CPU=build/cuda_on_cpu pytest -k cuda tests/test_agreement.py ...

`make cuda-on-cpu` does the same. Only conftest.py reads the variable, and the package does not know
of it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from compacter_kernels import call_path
from compacter_kernels.impl import cuda

VARIABLE = "CUDA_ON_CPU"
DEVICE = cuda.Device(multiprocessors=2, shared_limit=227 * 1024, shared_per_multiprocessor=228 * 1024, capability=90)


def load(folder: str) -> ModuleType:
    """The module that was built in that folder. It shares no Python type with the installed one."""
    (path,) = Path(folder).resolve().glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("cuda_on_cpu._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.build_info()["cuda"] == "on the CPU", f"{path} is another build"
    return module


def serve(module: ModuleType, patch: pytest.MonkeyPatch, device: cuda.Device = DEVICE) -> None:
    """From now on impl="cuda" serves tensors on the CPU, as a small device of that kind would."""
    patch.setattr(cuda, "_C", module)
    patch.setattr(cuda, "_BUILD", module.build_info())
    patch.setattr(cuda, "_DEVICE_TYPE", "cpu")
    patch.setattr(cuda, "_device", lambda index: device)
    patch.setattr(cuda, "_current_device", lambda: 0)
    patch.setattr(cuda, "_current_stream", lambda index: 0)
    patch.setattr(cuda, "unavailable", lambda: None)
    patch.setattr(call_path, "_plans", {})  # so that no plan for another device is kept

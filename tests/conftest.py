"""What holds in every test: uninitialised memory is poisoned, and the environment does not choose the impl.

Two variables put kernels on the CPU that need a GPU: TRITON_INTERPRET, and CUDA_ON_CPU (executed_cuda.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from executed_cuda import VARIABLE, load, serve

from compacter_kernels.dispatch import ENVIRONMENT

pytest.register_assert_rewrite("oracle")


def pytest_report_header() -> list[str]:
    """The impls that no test runs through."""
    from oracle import ABSENT

    return [f"not tested: impl {name}: {reason}" for name, reason in ABSENT.items()]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an element which a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def _nearest_bfloat16(convert: Any) -> Any:
    """Triton's interpreter cuts float32 off to bfloat16; a GPU rounds to the nearest."""

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if str(source) == "fp32" and str(target) == "bf16":
            found = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float32).to(torch.bfloat16)
            return found.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
        return convert(data, source, target, rounding)

    return convert_float


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    interpreter._convert_float = _nearest_bfloat16(interpreter._convert_float)


if folder := os.environ.get(VARIABLE):  # before the tests ask who serves the CPU
    serve(load(folder), pytest.MonkeyPatch())


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """impl="auto" is decided by the library."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Modules draw the same weights in every run."""
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """A test that changes torch's number of threads gives it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

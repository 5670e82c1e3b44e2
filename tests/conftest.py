"""Settings of all tests: uninitialised memory is NaN, and the environment chooses no impl.

Two variables let kernels that need a GPU run on the CPU: TRITON_INTERPRET, and CUDA_ON_CPU
(executed_cuda.py).
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
    """The impls that no test uses, each with the reason."""
    from oracle import ABSENT

    return [f"not tested: impl {name}: {reason}" for name, reason in ABSENT.items()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A report in XML has the marker `failure`, from which docs/reliability.md is made."""
    for item in items:
        if marker := item.get_closest_marker("failure"):
            item.user_properties.append(("failure", marker.args[0]))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN, so that a test detects elements that a kernel does not write."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def _nearest_bfloat16(convert: Any) -> Any:
    """Round to the nearest bfloat16, as a GPU does; Triton's interpreter truncates float32."""

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if str(source) == "fp32" and str(target) == "bf16":
            found = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float32).to(torch.bfloat16)
            return found.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
        return convert(data, source, target, rounding)

    return convert_float


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    interpreter._convert_float = _nearest_bfloat16(interpreter._convert_float)


if folder := os.environ.get(VARIABLE):  # before the tests ask which impls serve the CPU
    serve(load(folder), pytest.MonkeyPatch())


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library, and not the environment, decides which impl "auto" takes."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Modules draw the same weights in every run."""
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore torch's number of threads after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

"""impl="cuda" asks which CUDA the driver serves before anything is launched."""

from __future__ import annotations

import os
import re
from types import ModuleType

import pytest
import torch
from executed_cuda import VARIABLE
from oracle import Case

import compacter_kernels as ck
from compacter_kernels.impl import cuda
from compacter_kernels.problem import Bank

if os.environ.get(VARIABLE):
    pytest.skip("the executed kernels need no driver", allow_module_level=True)

OLD = re.escape("the driver serves CUDA 12.4, but the kernels were built with CUDA 13.0; update the driver, ")


def built(monkeypatch: pytest.MonkeyPatch, driver: int, runtime: int, archs: str = "sm_90") -> list[None]:
    """From now on there are CUDA kernels and a GPU. Each question for versions adds to the list."""
    asked: list[None] = []

    def versions() -> tuple[int, int]:
        asked.append(None)
        return driver, runtime

    module = ModuleType("_C")
    module.__dict__["cuda_versions"] = versions
    monkeypatch.setattr(cuda, "_C", module)
    monkeypatch.setattr(cuda, "_BUILD", {"cuda": True, "cuda_archs": archs.split()})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    return asked


@pytest.mark.parametrize("driver", [13000, 13020, 14000])
def test_a_driver_that_is_new_enough(monkeypatch: pytest.MonkeyPatch, driver: int) -> None:
    asked = built(monkeypatch, driver, 13000)
    assert cuda.unavailable() is None and cuda.unavailable() is None
    assert len(asked) == 1


def test_an_older_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    built(monkeypatch, 12040, 13000)
    assert re.match(OLD, str(ck.available_impls()["cuda"]))
    case = Case()
    with pytest.raises(RuntimeError, match=OLD):
        case.call(case.tensors(), "cuda")


@pytest.mark.parametrize("capability", [90, 91, 100])
def test_a_driver_of_the_same_major_version(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    """It runs machine code. It does not compile the PTX that a later generation needs."""
    built(monkeypatch, 12020, 12080)
    assert cuda.unavailable() is None
    reason = cuda._other_architecture(capability)
    assert (reason is None) == (capability < 100)
    assert reason is None or "CUDA 12.2, but the kernels were built with CUDA 12.8; update the driver" in reason
    built(monkeypatch, 12080, 12080)
    assert cuda._other_architecture(capability) is None


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [("sm_80", 90, 80), ("sm_80 sm_90", 100, 90), ("sm_80 sm_90", 90, 90), ("sm_80", 86, 80), ("", 90, 90)],
)
def test_a_plan_is_for_the_code_that_runs(
    monkeypatch: pytest.MonkeyPatch, archs: str, capability: int, runs: int
) -> None:
    """PTX of sm_80 does not wait for the kernel before it, not on a later device either."""
    built(monkeypatch, 13000, 13000, archs)
    for kind in ("CudaLinear", "CudaAdapter", "CudaBank"):
        monkeypatch.setitem(cuda._C.__dict__, kind, lambda *arguments: arguments[-1])
    device = cuda.Device(132, 2**17, 2**17, capability)
    assert cuda._plan("linear", (), device) == cuda._plan("adapter", (), device) == runs
    assert cuda._bank_plan((), Bank(2, False, ()), device) == runs

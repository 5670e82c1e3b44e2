"""The calls that benchmarks/tune_triton.py times, in Triton's interpreter."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest
import torch

from compacter_kernels.cases import Case, Shape

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter (make interpret)", allow_module_level=True)
pytest.importorskip("triton")

TUNE = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "tune_triton.py"))
CASE = Case.of(Shape(64, 16, 4), 20).inputs()


@pytest.mark.parametrize("kernel", sorted(TUNE["bound"](CASE).served))
def test_the_timed_call_is_the_adapter(kernel: str) -> None:
    """It computes the output or all gradients with the configuration of the candidate."""
    last = TUNE["bound"](CASE).served[kernel].configs[-1]
    candidate = TUNE["Candidate"](kernel, last)
    got = TUNE["bind"](CASE, candidate)(CASE.x, CASE.grad)
    expected = TUNE["reference"](CASE, candidate.direction)
    for result, exact in zip([got] if candidate.direction == "forward" else got, expected, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-4)

"""benchmarks/gpu_sanitize.py, executed on the CPU (executed_cuda.py)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
from executed_cuda import DEVICE, VARIABLE, load, serve
from oracle import BF16, problem

from compacter_kernels.impl import cuda, native

if not os.environ.get(VARIABLE):
    pytest.skip(f"no {VARIABLE}: `make cuda-on-cpu` builds it", allow_module_level=True)

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_sanitize.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, on a device that is large enough to give each block one tile of its calls."""
    serve(load(os.environ[VARIABLE]), monkeypatch, DEVICE._replace(multiprocessors=132))
    spec = importlib.util.spec_from_file_location("gpu_sanitize", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_ring_of_tiles_turns(script: Any) -> None:
    """A block has more tiles of each call than its ring has places, so it fills a place again.

    With bfloat16 there are rings of one place, of two and of three.
    """
    places = set()
    with script.few_multiprocessors():
        for case in script.cases():
            posed = problem(case)
            plan = cuda._plan(posed.operation, native.plan_arguments(posed), cuda._device(0))
            blocks, tokens, stages = plan.division(script.TOKENS)
            assert max(stages, 2) * blocks * tokens < script.TOKENS, case
            if case.dtype == BF16:
                places.add(stages)
    assert places == {1, 2, 3}


def test_the_script_runs(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main("cpu") == 0
    assert capsys.readouterr().out.count(": ok\n") == len(list(script.cases()))

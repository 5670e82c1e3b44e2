"""The CUDA sources, compiled for one architecture. `make ptxas` compiles for all."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "ptxas_report.py"
ARCH = "sm_90"
SOURCES = (  # these are compiled once for each dtype
    *("forward_general.cu", "backward_general.cu"),
    *("family_forward.cu", "family_backward.cu", "family_weights.cu"),
)
NEEDED = (os.environ.get("CUDACXX", "nvcc"), "cmake", "ninja")
MISSING = [tool for tool in NEEDED if shutil.which(tool) is None]

KERNEL = """
__global__ void __launch_bounds__(1024) {name}(float* p, int i) {{
    float kept[{floats}];
    for (int j = 0; j < {floats}; ++j) kept[j] = p[j * 1024 + threadIdx.x];
    __syncthreads();
    for (int j = 0; j < {floats}; ++j) p[j * 1024 + threadIdx.x] = kept[j] * kept[{index}];
}}
"""
EVICTS = "__global__ void __launch_bounds__(32) evicts(float* p) { __stcs(p + threadIdx.x, 0.f); }"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("ptxas_report", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}")
def test_no_kernel_has_a_fault() -> None:
    """No kernel spills, has a stack, or takes more registers than its launch bounds allow.

    Each has matrix instructions and wide accesses.
    """
    done = subprocess.run([sys.executable, SCRIPT, "--json", "--arch", ARCH], capture_output=True, text=True)
    assert done.stdout, done.stderr
    rows = json.loads(done.stdout)
    assert not [row for row in rows if row["faults"]]
    assert {row["arch"] for row in rows} == {ARCH}
    kernels = {(row["source"], row["element"], row["kernel"]) for row in rows}
    assert len(rows) == len(kernels)
    elements = {(source, element) for source, element, _ in kernels if element}
    assert elements == {(source, element) for source in SOURCES for element in ("f32", "bf16", "f16")}


@pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}")
def test_a_kernel_that_spills_is_found(script: Any, tmp_path: Path) -> None:
    """Each fault that the report knows appears in one of three kernels, or in several."""
    source = tmp_path / "kernels.cu"
    good, bad = {"name": "small", "floats": 4, "index": 0}, {"name": "spills", "floats": 96, "index": "i"}
    source.write_text(KERNEL.format(**good) + KERNEL.format(**bad) + EVICTS)
    command = [NEEDED[0], "-O3", "-gencode=arch=compute_90,code=sm_90", "-c", str(source), "-o", "object.o"]
    rows = {row["kernel"]: row for row in script.rows_of(script.Unit(source.name, "", command, str(tmp_path)))}
    small, spills, evicts = (
        next(row for name, row in rows.items() if part in name) for part in ("small", "spills", "evicts")
    )
    lacks = ["no matrix instructions", "no 128-bit loads", "no 128-bit stores"]
    assert script.faults(small) == lacks
    assert (small["threads"], small["register_limit"], small["arch"]) == (1024, 64, "sm_90")
    assert any("of stack" in fault for fault in script.faults(spills))
    assert "stores that the caches evict before the next layer reads them" in script.faults(evicts)
    assert script.faults({**small, "registers": 72})[0] == "more than 64 registers"

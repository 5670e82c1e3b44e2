"""A sum over tiles is no accumulator of a tensor core, which truncates it.

The compiled code of the kernels with such sums is read, without a GPU. A loop over tiles is an
outermost loop. What it carries may be an operand of an addition, but not the accumulator of a
product.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

import pytest

from compacter_kernels.cases import Shape

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton")

LOOP = re.compile(r"scf\.for .*?iter_args\((.*?)\) -> ")
CARRIED = re.compile(r"(%[\w.#:]+) = (%[\w.#:]+)")
PRODUCT = re.compile(r"(?:tt\.dot|ttng\.warp_group_dot) %[^,]+, %[^,]+, (%[\w.#]+)")


@pytest.fixture(scope="module")
def report() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
        return importlib.import_module("aot_report")


def accumulators_over_tiles(code: str) -> tuple[int, list[str]]:
    """The number of outermost loops, and the lines of products that add to what these carry."""
    outermost, carried, open_loops, found = 0, set[str](), list[str](), []
    for line in code.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if match := LOOP.search(line):
            pairs = CARRIED.findall(match[1])
            if not open_loops:
                outermost += 1
                carried = {name for name, _ in pairs}
            else:  # an inner loop hands on what the outer one carries
                carried |= {name for name, start in pairs if start in carried}
        if "scf.for" in line:
            open_loops.append(indent)
        elif open_loops and line.startswith(f"{open_loops[-1]}}}"):
            open_loops.pop()
        if open_loops and (match := PRODUCT.search(line)) and match[1] in carried:
            found.append(line.strip())
    return outermost, found


@pytest.mark.parametrize(("dtype", "arch"), [("bf16", "sm_80"), ("bf16", "sm_90"), ("fp32", "sm_90")])
@pytest.mark.parametrize("shape", [Shape(64, 16, 4), Shape(96, 24, 12)], ids=str)
def test_no_product_adds_to_a_sum_over_tiles(report: Any, shape: Shape, dtype: str, arch: str) -> None:
    seen = 0
    for kernel in ("backward", "columns", "sums"):
        job = report.Job("adapter", kernel, shape, dtype, arch)
        for launched in report.launches_of(job, report.OPTIONS)[:1]:
            loops, found = accumulators_over_tiles(report.compiled(launched, job).asm["ttgir"])
            assert loops and not found, kernel
            seen += 1
    assert seen

"""The path of x from the public function down to the kernel, which visits each file once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import FUSED, Case, weights
from test_layout import RANK, part_of
from torch import Tensor

import compacter_kernels as ck

PACKAGE = Path(ck.__file__).parent


def holds(value: object, x: Tensor) -> bool:
    return value is x or (isinstance(value, tuple) and any(part is x for part in value))


def files_of(call: Callable[[], object], x: Tensor) -> list[str]:
    """The modules whose functions get x, or a call that holds x, in order.

    Consecutive calls in the same module count once.
    """
    found: list[str] = []

    def profile(frame: Any, event: str, arg: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event != "call" or PACKAGE not in path.parents:
            return
        code = frame.f_code
        arguments = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount]]
        rest = [frame.f_locals.get(name) for name in code.co_varnames[code.co_argcount : code.co_argcount + 2]]
        if not any(holds(value, x) for value in (*arguments, *rest)):
            return
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not found or found[-1] != name:
            found.append(name)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("how", ["no grad", "grad", "out"])
@pytest.mark.parametrize("case", [Case("linear"), Case(residual="both"), Case(residual="x")], ids=str)
def test_each_file_once_and_downwards(case: Case, how: str, impl: str) -> None:
    if how == "out" and case.operation == "linear":
        pytest.skip("phm_linear has no out")
    tensors = case.tensors()
    options = {"out": torch.empty_like(tensors["x"])} if how == "out" else {}
    with torch.set_grad_enabled(how == "grad"):

        def call() -> Tensor:
            return case.call(tensors, impl, **options)

        call()  # makes the plan
        found = [name for name in files_of(call, tensors["x"]) if name != "cases"]  # this module makes the call
    assert found[0] == "functional"
    assert len(found) == len(set(found)), found
    ranks = [RANK[part_of(f"compacter_kernels.{name}")] for name in found]
    assert ranks == sorted(ranks, reverse=True), found
    assert ("autograd" in found) == (how == "grad")


def test_explain_reads_the_same_call() -> None:
    """Both report a wrong argument by the same message."""
    tensors = Case(residual="other").tensors()
    down, up = weights(tensors, "down."), weights(tensors, "up.")
    for options in ({"residual": torch.ones(3)}, {"scale": "2"}, {"norm": 3}, {"out": 3}, {"impl": "gpu"}):
        said = []
        for function in (ck.compacter_adapter, ck.explain):
            with torch.no_grad(), pytest.raises((TypeError, ValueError)) as error:
                function(tensors["x"], down, up, **options)
            said.append(str(error.value))
        assert said[0] == said[1]

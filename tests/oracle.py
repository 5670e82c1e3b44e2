"""Helpers for tests with the cases and the oracle of the package.

They select the impls of this process, compare bits, and handle refusals.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels import accuracy, cases
from compacter_kernels.accuracy import Oracle
from compacter_kernels.activations import resolve
from compacter_kernels.cases import Tensors, call, weights
from compacter_kernels.dispatch import IMPLS as MODULES, PLAIN
from compacter_kernels.problem import Problem, Projection, adapter_problem, linear_problem

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def _why_not(name: str) -> str | None:
    """The reason why the impl cannot serve a plain call on the CPU in this process, or None."""
    module, sizes = MODULES[name], Projection(1, 1, 1, 1, 2, 2, (FP32,) * 4)
    plain = Problem("adapter", torch.device("cpu"), FP32, (sizes, sizes), resolve("relu"))
    return ck.available_impls()[name] or module.refuses(plain)


# Tests leave out the impls that cannot serve. conftest.py prints them and the reasons at the start.
ABSENT = {name: reason for name in MODULES if (reason := _why_not(name)) is not None}
IMPLS = [name for name in MODULES if name not in ABSENT]
FUSED = [name for name in IMPLS if name not in PLAIN]
NOT_DENSE = [name for name in IMPLS if name != "dense"]


class Case(cases.Case):
    """A case that tests call on tensors of their own."""

    def call(self, tensors: Tensors, impl: str = "auto", **options: Any) -> Tensor:
        """The public function on these tensors, with these arguments more."""
        return call(impl, **options)(self.inputs(tensors, grad=tensors["x"]))


def run(case: Case, tensors: Tensors, impl: str, grad: Tensor | None = None) -> Tensors:
    """The output and the gradient of every tensor that requires one, by name.

    The tensors get no .grad.
    """
    return accuracy.run(case.inputs(tensors, grad), call(impl))


def copies(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """New contiguous leaves with the same values, in `dtype` if it is given."""
    return {
        name: t.detach().to(dtype or t.dtype, copy=True).contiguous().requires_grad_(t.requires_grad)
        for name, t in tensors.items()
    }


def bits(tensor: Tensor) -> Tensor:
    """The bytes of the tensor. They are equal for equal bits, also for NaN."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_same_bits(got: Tensors, expected: Tensors) -> None:
    """Every tensor is bitwise the same."""
    assert got.keys() == expected.keys()
    different = [name for name in got if not torch.equal(bits(got[name]), bits(expected[name]))]
    assert not different


def problem(case: Case, device: str = "cpu") -> Problem:
    """The problem that the case poses on that device."""
    tensors = case.tensors()
    if case.operation == "linear":
        found = linear_problem(tensors["x"], weights(tensors))
    else:
        bank = () if case.bank is None else (case.bank, "mix" in tensors)
        found = adapter_problem(
            tensors["x"], weights(tensors, "down."), weights(tensors, "up."), case.activation, *bank
        )
    return found._replace(device=torch.device(device))


def skip_if_refused(case: Case, tensors: Tensors, impl: str) -> None:
    """If the impl refuses these sizes, check that the call raises the reason, and skip the test."""
    device = tensors["x"].device.type
    reason = MODULES[impl].refuses(problem(case, device))
    if reason is not None:
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            case.call(tensors, impl)
        pytest.skip(f"{impl}: {reason}")


class Reference(Oracle):
    """An oracle that describes each deviation in words."""

    def violations(self, got: Tensors, impl: str = "") -> list[str]:
        """A description of each result of `impl` that is outside the limits."""
        return [str(deviation) for deviation in self.compare(got, impl) if not deviation.holds]

    def accept(self, got: Tensors, impl: str = "") -> None:
        """All results of `impl` exist, are within the limits, and have the right dtypes."""
        assert got.keys() == self.exact.keys()
        assert not self.violations(got, impl)


def oracle(case: Case, tensors: Tensors, grad: Tensor) -> Reference:
    """The oracle of a call with these tensors."""
    return Reference(case.inputs(tensors, grad))


@functools.lru_cache(maxsize=4)
def reference(case: Case) -> Reference:
    """The oracle of a case with its own tensors. Consecutive tests of one case share it."""
    return Reference(case.inputs())

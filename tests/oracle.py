"""What tests add to the cases and the oracle of the package: the impls of this process, bits, refusals."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels import accuracy
from compacter_kernels.accuracy import Oracle
from compacter_kernels.activations import resolve
from compacter_kernels.cases import Case, Tensors, call, weights
from compacter_kernels.dispatch import IMPLS as MODULES, PLAIN
from compacter_kernels.problem import Problem, Projection, adapter_problem, linear_problem

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def _why_not(name: str) -> str | None:
    """Why the impl cannot serve a plain call on the CPU in this process, or None."""
    module, sizes = MODULES[name], Projection(1, 1, 2, 2, (FP32,) * 4)
    plain = Problem("adapter", torch.device("cpu"), FP32, (sizes, sizes), resolve("relu"))
    return ck.available_impls()[name] or module.refuses(plain)


# Tests have no cases for the impls that cannot serve; conftest says at the start of a run which these are, and why.
ABSENT = {name: reason for name in MODULES if (reason := _why_not(name)) is not None}
IMPLS = [name for name in MODULES if name not in ABSENT]
FUSED = [name for name in IMPLS if name not in PLAIN]
NOT_DENSE = [name for name in IMPLS if name != "dense"]


def run(case: Case, tensors: Tensors, impl: str, grad: Tensor | None = None) -> Tensors:
    """The output and the gradient of every tensor that requires one, by name; the tensors keep no .grad."""
    return accuracy.run(case.inputs(tensors, grad), call(impl))


def copies(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """Fresh contiguous leaves with the same values, in `dtype` where given."""
    return {
        name: t.detach().to(dtype or t.dtype, copy=True).contiguous().requires_grad_(t.requires_grad)
        for name, t in tensors.items()
    }


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes: equal for equal bits, NaN included."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_same_bits(got: Tensors, expected: Tensors) -> None:
    """Every tensor bitwise the same."""
    assert got.keys() == expected.keys()
    different = [name for name in got if not torch.equal(bits(got[name]), bits(expected[name]))]
    assert not different


def problem(case: Case, device: str = "cpu") -> Problem:
    """What the case asks for on that device."""
    tensors = case.tensors()
    if case.operation == "linear":
        found = linear_problem(tensors["x"], weights(tensors))
    else:
        found = adapter_problem(tensors["x"], weights(tensors, "down."), weights(tensors, "up."), case.activation)
    return found._replace(device=torch.device(device))


def skip_if_refused(case: Case, tensors: Tensors, impl: str) -> None:
    """An impl may refuse sizes: then the call says why, and the test ends here."""
    device = tensors["x"].device.type
    reason = MODULES[impl].refuses(problem(case, device))
    if reason is not None:
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            case.call(tensors, impl)
        pytest.skip(f"{impl}: {reason}")


class Reference(Oracle):
    """An oracle that says in words what is wrong."""

    def violations(self, got: Tensors, impl: str = "") -> list[str]:
        """What is wrong with these results of `impl`, in words; nothing where they are within the limits."""
        return [str(deviation) for deviation in self.compare(got, impl) if not deviation.holds]

    def accept(self, got: Tensors, impl: str = "") -> None:
        """The results of `impl` are all there, within the limits, in the dtypes of the tensors they belong to."""
        assert got.keys() == self.exact.keys()
        assert not self.violations(got, impl)


def oracle(case: Case, tensors: Tensors, grad: Tensor) -> Reference:
    """The oracle of a call with these tensors."""
    return Reference(case.inputs(tensors, grad))


@functools.lru_cache(maxsize=4)
def reference(case: Case) -> Reference:
    """The oracle of a case with its own tensors; consecutive tests of one case share it."""
    return Reference(case.inputs())

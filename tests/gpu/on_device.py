"""Calls moved to the GPU, and the fused impls that serve them there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from oracle import Case, Tensors, oracle, run, weights
from torch import Tensor

from compacter_kernels.dispatch import IMPLS, PLAIN
from compacter_kernels.problem import Problem, adapter_problem, linear_problem

DEVICE = "cuda"


def _problem(case: Case) -> Problem:
    """The problem of the case on the device."""
    tensors = case.tensors()
    if case.operation == "linear":
        found = linear_problem(tensors["x"], weights(tensors))
    else:
        found = adapter_problem(tensors["x"], weights(tensors, "down."), weights(tensors, "up."), case.activation)
    return found._replace(device=torch.device(DEVICE))


def _serving() -> list[Any]:
    """Every fused impl that does not refuse the device, skipped with its reason where it cannot run."""
    if not torch.cuda.is_available():
        return [pytest.param("any", marks=pytest.mark.skip(reason="no CUDA device"))]
    problem = _problem(Case())
    found = []
    for name, module in IMPLS.items():
        if name not in PLAIN and module.refuses(problem) is None:
            reason = module.unavailable()
            found.append(pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}")))
    return found


SERVING = _serving()


def moved(tensors: Tensors) -> Tensors:
    """The same leaves on the device."""
    return {name: t.detach().to(DEVICE, copy=True).requires_grad_(t.requires_grad) for name, t in tensors.items()}


def inputs(case: Case) -> tuple[Tensors, Tensor]:
    """The tensors of a case and what its backward starts from, on the device."""
    return moved(case.tensors()), case.grad_output().to(DEVICE)


def check(case: Case, impl: str, must_serve: bool = False) -> None:
    """The output and all gradients of a call on the device, against the float64 oracle there.

    Unless it must serve, an impl may refuse the sizes; then the call raises and says why.
    """
    tensors, grad = inputs(case)
    reason = IMPLS[impl].refuses(_problem(case))
    if reason is not None and not must_serve:
        with pytest.raises(RuntimeError, match=re.escape(reason)):
            case.call(tensors, impl)
        pytest.skip(f"{impl}: {reason}")
    oracle(case, tensors, grad).check(run(case, tensors, impl, grad), impl)

"""Cases moved to the GPU, and the fused impls that serve them there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import Case, Tensors, oracle, problem, run, skip_if_refused
from torch import Tensor

from compacter_kernels.dispatch import IMPLS, PLAIN

DEVICE = "cuda"


def _serving() -> list[Any]:
    """Every fused impl that does not refuse the device.

    An impl that cannot run is skipped with its reason.
    """
    if not torch.cuda.is_available():
        return [pytest.param("any", marks=pytest.mark.skip(reason="no CUDA device"))]
    plain = problem(Case(), DEVICE)
    found = []
    for name, module in IMPLS.items():
        if name not in PLAIN and module.refuses(plain) is None:
            reason = module.unavailable()
            found.append(pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}")))
    return found


SERVING = _serving()


def moved(tensors: Tensors) -> Tensors:
    """The same leaves on the device."""
    return {name: t.detach().to(DEVICE, copy=True).requires_grad_(t.requires_grad) for name, t in tensors.items()}


def inputs(case: Case) -> tuple[Tensors, Tensor]:
    """The tensors of a case and the gradient of its output, on the device."""
    return moved(case.tensors()), case.grad_output().to(DEVICE)


def check(case: Case, impl: str, must_serve: bool = False) -> None:
    """The output and all gradients of a call on the device agree with the float64 oracle there.

    Unless it must serve, an impl may refuse the sizes. Then the call raises an error with the
    reason.
    """
    tensors, grad = inputs(case)
    if not must_serve:
        skip_if_refused(case, tensors, impl)
    oracle(case, tensors, grad).accept(run(case, tensors, impl, grad), impl)

"""The kernels that a visit to a GPU compares.

A kernel has the name of an impl, or the path of another build of the native part, whose CUDA
kernels then run in place of those of this build.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from compacter_kernels import autograd
from compacter_kernels.calls import AdapterCall
from compacter_kernels.cases import Inputs, Shape
from compacter_kernels.dispatch import IMPLS
from compacter_kernels.impl import Kernel, cuda
from compacter_kernels.problem import adapter_problem

SHAPES = (Shape(768, 24, 4), Shape(1024, 64, 8), Shape(768, 48, 12), Shape(4096, 128, 8))
WANTED = (True,) * 9  # the gradients of x and of all parameters


@functools.cache
def native(path: str) -> Any:
    """The native part in a file `_C*.so`, beside the one that the package has loaded."""
    spec = importlib.util.spec_from_file_location("another_build._C", Path(path).resolve())
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is neither an impl nor a build of the native part, a file _C*.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernel_of(name: str, inputs: Inputs) -> Kernel:
    """The kernel for the adapter of these inputs; RuntimeError where it cannot serve them."""
    assert inputs.up is not None
    problem = adapter_problem(inputs.x, inputs.down, inputs.up, inputs.activation)
    if name not in IMPLS:
        with mock.patch.object(cuda, "_C", native(name)):
            return cuda.prepare(problem)
    if reason := IMPLS[name].unavailable() or IMPLS[name].refuses(problem):
        raise RuntimeError(f"{name} cannot serve: {reason}")
    return IMPLS[name].prepare(problem)


def call_of(inputs: Inputs) -> AdapterCall:
    """The adapter with x as its residual."""
    assert inputs.up is not None
    return AdapterCall(inputs.x, inputs.down, inputs.up, residual=None, add_x=True, scale=1.0)


def adapter(name: str) -> Callable[[Inputs], torch.Tensor]:
    """The adapter through that kernel, differentiable, as a function of inputs."""

    def function(inputs: Inputs) -> torch.Tensor:
        kernel, call = kernel_of(name, inputs), call_of(inputs)
        return autograd.forward(kernel, call) if torch.is_grad_enabled() else kernel.forward(call)

    return function

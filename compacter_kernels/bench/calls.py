"""The calls that are timed: the public function through an impl, and alternatives in torch.

The adapters named `lowp` cast the weights to the dtype of x and compute everything in it, as a user
would who accepts the error: H in bfloat16, for example, keeps 8 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels.activations import resolve
from compacter_kernels.cases import Inputs
from compacter_kernels.impl import factored
from compacter_kernels.weights import PHMWeights, kronecker_sum

Call = Callable[[], Tensor]
Bind = Callable[[Inputs], Call]
Adapter = Callable[[Tensor, PHMWeights, PHMWeights, str], Tensor]  # x, down, up, activation; the residual is x


def through(impl: str) -> Adapter:
    """Return the public function through that impl."""

    def adapter(x: Tensor, down: PHMWeights, up: PHMWeights, activation: str) -> Tensor:
        return ck.compacter_adapter(x, down, up, activation=activation, residual=x, impl=impl)

    return adapter


def _lowp(project: Callable[[Tensor, PHMWeights], Tensor]) -> Adapter:
    def adapter(x: Tensor, down: PHMWeights, up: PHMWeights, activation: str) -> Tensor:
        return x + project(resolve(activation).function(project(x, down)), up)

    return adapter


def _dense_project(x: Tensor, weights: PHMWeights) -> Tensor:
    y = x @ kronecker_sum(weights, x.dtype)
    return y if weights.bias is None else y + weights.bias.to(x.dtype)


dense_lowp, factored_lowp = _lowp(_dense_project), _lowp(factored._project)


def arguments(case: Inputs) -> tuple[Tensor, PHMWeights, PHMWeights, str]:
    """Return the arguments of an adapter for this case."""
    assert case.up is not None and case.residual is case.x
    return case.x, case.down, case.up, case.activation


def eager(adapter: Adapter) -> Bind:
    """Bind the adapter to a case as it is."""
    return lambda case: functools.partial(adapter, *arguments(case))


def compiled_for_each_cell(adapter: Adapter) -> Bind:
    """Compile the adapter for each shape and token count."""

    def bind(case: Inputs) -> Call:
        x, down, up, activation = arguments(case)
        return torch.compile(lambda: adapter(x, down, up, activation), fullgraph=True, dynamic=False)

    return bind


def compiled_once(adapter: Adapter) -> Bind:
    """Compile the adapter once for all token counts; T=1 is refused."""
    compiled = functools.cache(lambda: torch.compile(adapter, fullgraph=True))

    def bind(case: Inputs) -> Call:
        if case.x.shape[0] == 1:
            raise RuntimeError("T=1 would be compiled once more; its time is the host's, as at the next token count")
        call = functools.partial(compiled(), *arguments(case))
        torch._dynamo.maybe_mark_dynamic(case.x, 0)
        return call

    return bind


def dense_cached(case: Inputs, lowp: bool = False) -> Call:
    """Build H before the timing; compute in the dtype of x with lowp, else at least in float32."""
    x, down, up, name = arguments(case)
    assert down.bias is not None and up.bias is not None
    activation = resolve(name).function
    dtype = x.dtype if lowp else torch.promote_types(x.dtype, torch.float32)
    parts = (ck.phm_matrix(down), down.bias, ck.phm_matrix(up), up.bias)
    down_matrix, down_bias, up_matrix, up_bias = (part.to(dtype) for part in parts)

    def run() -> Tensor:
        y = torch.addmm(up_bias, activation(torch.addmm(down_bias, x.to(dtype), down_matrix)), up_matrix)
        return (y + x).to(x.dtype)

    return run

"""What else a user could run on a GPU: 16-bit matrix products, and torch.compile.

`-lowp` casts the weights to x's dtype and computes all in it, as a user would who does not mind: H in bfloat16, say,
keeps 8 bits. That is beyond the error that the contract allows, so these pass a gate of their own, LOOSE_UNITS units in
the last place of x's dtype, and the tables mark them. `-compiled` is compiled once for all token counts above 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels.accuracy import Case
from compacter_kernels.activations import resolve
from compacter_kernels.bench.cost import FORWARD
from compacter_kernels.bench.providers import Call, Provider
from compacter_kernels.impl import factored
from compacter_kernels.weights import PHMWeights, kronecker_sum

LOOSE_UNITS = 16
Adapter = Callable[[Tensor, PHMWeights, PHMWeights, str], Tensor]  # x, down, up, activation; the residual is x
Project = Callable[[Tensor, PHMWeights], Tensor]


def loose_limit(dtype: torch.dtype) -> float:
    """The error that a provider which computes in x's dtype may have."""
    return LOOSE_UNITS * torch.finfo(dtype).eps


def _through(impl: str) -> Adapter:
    def adapter(x: Tensor, down: PHMWeights, up: PHMWeights, activation: str) -> Tensor:
        return ck.compacter_adapter(x, down, up, activation=activation, residual=x, impl=impl)

    return adapter


def _lowp(project: Project) -> Adapter:
    def adapter(x: Tensor, down: PHMWeights, up: PHMWeights, activation: str) -> Tensor:
        return x + project(resolve(activation).function(project(x, down)), up)

    return adapter


def _dense_project(x: Tensor, weights: PHMWeights) -> Tensor:
    y = x @ kronecker_sum(weights, x.dtype)
    return y if weights.bias is None else y + weights.bias.to(x.dtype)


def _bound(adapter: Adapter) -> Callable[[Case], Call]:
    def bind(case: Case) -> Call:
        x, down, up, residual, _, activation = case
        assert up is not None and residual is x
        return lambda: adapter(x, down, up, activation)

    return bind


@functools.cache
def _compiled(adapter: Adapter) -> Adapter:
    """One compiled function for every token count; T=1, which torch would compile once more, is refused."""
    compiled = torch.compile(adapter, fullgraph=True)

    def run(x: Tensor, down: PHMWeights, up: PHMWeights, activation: str) -> Tensor:
        if x.shape[0] == 1:
            raise RuntimeError("T=1 would be compiled once more; its time is the host's, as at the next token count")
        torch._dynamo.maybe_mark_dynamic(x, 0)
        result: Tensor = compiled(x, down, up, activation)
        return result

    return run


def _bound_compiled(adapter: Adapter) -> Callable[[Case], Call]:
    return lambda case: _bound(_compiled(adapter))(case)


def _dense_cached_lowp(case: Case) -> Call:
    x, down, up, residual, _, name = case
    assert up is not None and residual is x
    first, second = (ck.phm_matrix(weights).to(x.dtype) for weights in (down, up))
    bias, up_bias = (
        torch.zeros((), dtype=x.dtype, device=x.device) if b is None else b.to(x.dtype) for b in (down.bias, up.bias)
    )
    activation = resolve(name).function
    return lambda: x + torch.addmm(up_bias, activation(torch.addmm(bias, x, first)), second)


_DENSE, _FACTORED = _through("dense"), _through("factored")
_DENSE_LOWP, _FACTORED_LOWP = _lowp(_dense_project), _lowp(factored._project)


def rivals(dtype: torch.dtype) -> list[Provider]:
    """The providers beyond those of the CPU; the lowp ones where x has 16 bits."""
    found = [
        Provider("dense-compiled", _bound_compiled(_DENSE), compiled=True),
        Provider("factored-compiled", _bound_compiled(_FACTORED), compiled=True),
    ]
    if dtype.itemsize == 2:
        found += [
            Provider("dense-lowp", _bound(_DENSE_LOWP), loose=True),
            Provider("dense-cached-lowp", _dense_cached_lowp, (FORWARD,), loose=True),
            Provider("factored-lowp", _bound(_FACTORED_LOWP), loose=True),
            Provider("dense-lowp-compiled", _bound_compiled(_DENSE_LOWP), loose=True, compiled=True),
            Provider("factored-lowp-compiled", _bound_compiled(_FACTORED_LOWP), loose=True, compiled=True),
        ]
    return found

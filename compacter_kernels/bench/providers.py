"""What is timed: the public function through each impl, and what a user could run instead of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels.accuracy import Case
from compacter_kernels.activations import resolve
from compacter_kernels.bench.cost import BOTH, DIRECTIONS, FORWARD
from compacter_kernels.dispatch import IMPLS, PLAIN

Call = Callable[[], Tensor]
COMPILED = "factored-compiled"


class Provider(NamedTuple):
    """bind(case) prepares what is not to be timed and returns the call that is; its output can be differentiated.

    `checked` providers compute the adapter, so the correctness gate is for them.
    """

    name: str
    bind: Callable[[Case], Call]
    directions: tuple[str, ...] = DIRECTIONS
    checked: bool = True


def _copy(case: Case) -> Call:
    return case.x.clone


def _copy_both(case: Case) -> Call:
    """The bytes of a fused forward and backward: read x, write out; read x and the gradient, write dx. No autograd."""
    x, grad = case.x, case.grad

    def run() -> Tensor:
        x.clone()
        return torch.add(x, grad)

    return run


def _through(impl: str) -> Callable[[Case], Call]:
    def bind(case: Case) -> Call:
        x, down, up, residual, _, activation = case
        assert up is not None
        return lambda: ck.compacter_adapter(x, down, up, activation=activation, residual=residual, impl=impl)

    return bind


def _dense_cached(case: Case) -> Call:
    x, down, up, residual, _, name = case
    assert up is not None
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = ck.phm_matrix(down).to(wide), ck.phm_matrix(up).to(wide)
    bias, up_bias = (torch.zeros(()) if b is None else b.to(wide) for b in (down.bias, up.bias))
    activation = resolve(name).function

    def run() -> Tensor:
        y = torch.addmm(up_bias, activation(torch.addmm(bias, x.to(wide), first)), second)
        return (y if residual is None else y + residual).to(x.dtype)

    return run


def _compiled(case: Case) -> Call:
    return torch.compile(_through("factored")(case), fullgraph=True, dynamic=False)


def providers() -> dict[str, Provider]:
    """All of them by name; the fused impls are those that this process can run."""
    available = ck.available_impls()
    fused = [name for name in IMPLS if name not in PLAIN and available[name] is None]
    found = [
        Provider("copy", _copy, checked=False),
        Provider("dense", _through("dense")),
        Provider("dense-cached", _dense_cached, (FORWARD,)),
        Provider("factored", _through("factored")),
        Provider(COMPILED, _compiled),
        *(Provider(name, _through(name)) for name in fused),
    ]
    return {provider.name: provider for provider in found}


def missing() -> dict[str, str]:
    """The fused impls that this process cannot run, and why."""
    return {name: why for name, why in ck.available_impls().items() if name not in PLAIN and why is not None}


def timed(provider: Provider, case: Case, direction: str) -> Callable[[], object]:
    """The call to time: without grad for forward; else also the gradients of x and of all parameters."""
    if direction == FORWARD:
        run = provider.bind(case)

        def forward() -> Tensor:
            with torch.no_grad():
                return run()

        return forward
    assert direction == BOTH
    if not provider.checked:
        return _copy_both(case)
    case = case.map(lambda t: t.detach().requires_grad_())
    wanted, grad, run = list(case.tensors().values()), case.grad.detach(), provider.bind(case)
    return lambda: torch.autograd.grad(run(), wanted, grad)

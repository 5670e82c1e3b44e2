"""What is timed: the public function through each impl, and what a user could run instead of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels.accuracy import Case, Shape, random_case
from compacter_kernels.activations import resolve
from compacter_kernels.bench.cost import BOTH, DIRECTIONS, FORWARD
from compacter_kernels.dispatch import IMPLS, PLAIN
from compacter_kernels.problem import adapter_problem

Call = Callable[[], Tensor]
COMPILED = "factored-compiled"


class Provider(NamedTuple):
    """bind(case) prepares what is not to be timed and returns the call that is; its output can be differentiated.

    `checked` providers compute the adapter, so the correctness gate is for them; a `loose` one computes in x's own
    dtype, which is beyond the contract's error, and passes a gate of its own (`compacter_kernels.bench.rivals`).
    """

    name: str
    bind: Callable[[Case], Call]
    directions: tuple[str, ...] = DIRECTIONS
    checked: bool = True
    loose: bool = False
    compiled: bool = False


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


def _fused(device: str) -> dict[str, str | None]:
    """Every fused impl, and why it does not serve that device in this process."""
    case = random_case(Shape(24, 12, 4), 1)
    assert case.up is not None
    problem = adapter_problem(case.x, case.down, case.up, "gelu_new")._replace(device=torch.device(device))
    available = ck.available_impls()
    return {name: available[name] or IMPLS[name].refuses(problem) for name in IMPLS if name not in PLAIN}


def providers(device: str = "cpu") -> dict[str, Provider]:
    """All of them by name; the fused impls are those that this process can run."""
    fused = [name for name, reason in _fused(device).items() if reason is None]
    found = [
        Provider("copy", _copy, checked=False),
        Provider("dense", _through("dense")),
        Provider("dense-cached", _dense_cached, (FORWARD,)),
        Provider("factored", _through("factored")),
        *([] if device == "cuda" else [Provider(COMPILED, _compiled, compiled=True)]),
        *(Provider(name, _through(name)) for name in fused),
    ]
    return {provider.name: provider for provider in found}


def missing(device: str = "cpu") -> dict[str, str]:
    """The fused impls that this process cannot run there, and why."""
    return {name: why for name, why in _fused(device).items() if why is not None}


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

"""The providers: every timed way to compute the adapter, and the copy they are compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels import saved
from compacter_kernels.bench import calls
from compacter_kernels.bench.cost import BOTH, DIRECTIONS, FORWARD
from compacter_kernels.cases import Case, Inputs, Shape
from compacter_kernels.dispatch import IMPLS, PLAIN
from compacter_kernels.problem import adapter_problem


class Provider(NamedTuple):
    """bind(case) prepares whatever is not timed, and returns the call that is.

    checked: False for the copy, which computes no adapter and passes no gate. loose: True where it
    computes in the dtype of x, which is beyond the contract's error; the gate has a second limit
    for it. compiled: True where it goes through torch.compile.
    """

    name: str
    bind: calls.Bind
    directions: tuple[str, ...] = DIRECTIONS
    checked: bool = True
    loose: bool = False
    compiled: bool = False


def _fused(device: str) -> dict[str, str | None]:
    """Return every fused impl, and why it does not serve that device in this process."""
    x, down, up, _ = calls.arguments(Case.of(Shape(24, 12, 4), 1).inputs())
    problem = adapter_problem(x, down, up, "gelu_new")._replace(device=torch.device(device))
    available = ck.available_impls()
    return {name: available[name] or IMPLS[name].refuses(problem) for name in IMPLS if name not in PLAIN}


def missing(device: str = "cpu") -> dict[str, str]:
    """Return the fused impls that this process cannot run on the device, and why."""
    return {name: reason for name, reason in _fused(device).items() if reason is not None}


def providers(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Provider]:
    """Return all providers of the device by name; those in low precision if x has 16 bits."""
    dense, factored = calls.through("dense"), calls.through("factored")
    fused = [name for name, reason in _fused(device).items() if reason is None]
    table = [
        Provider("copy", lambda case: case.x.clone, checked=False),
        Provider("dense", calls.eager(dense)),
        Provider("dense-cached", calls.dense_cached, (FORWARD,)),
        Provider("factored", calls.eager(factored)),
    ]
    if device == "cpu":
        table.append(Provider("factored-compiled", calls.compiled_for_each_cell(factored), compiled=True))
    table += [Provider(name, calls.eager(calls.through(name))) for name in fused]
    if device == "cuda":
        compiled = {"dense": dense, "factored": factored}
        if dtype.itemsize == 2:
            lowp = {"dense-lowp": calls.dense_lowp, "factored-lowp": calls.factored_lowp}
            table += [Provider(name, calls.eager(adapter), loose=True) for name, adapter in lowp.items()]
            cached = functools.partial(calls.dense_cached, lowp=True)
            table.append(Provider("dense-cached-lowp", cached, (FORWARD,), loose=True))
            compiled |= lowp
        for name, adapter in compiled.items():
            loose, bind = name.endswith("lowp"), calls.compiled_once(adapter)
            table.append(Provider(f"{name}-compiled", bind, loose=loose, compiled=True))
    return {provider.name: provider for provider in table}


def _copy_both(case: Inputs, keep_out: bool) -> Callable[[], object]:
    """Move the bytes of a fused call: read x, write out; read x and the gradient, write dx."""
    x, grad = case.x, case.grad
    if keep_out:
        return lambda: (x.clone(), torch.add(x, grad))

    def run() -> Tensor:
        x.clone()
        return torch.add(x, grad)

    return run


def make_call(provider: Provider, case: Inputs, direction: str, keep_out: bool = False) -> Callable[[], object]:
    """Return the call to time: without grad, or with the gradients of x and of all parameters.

    keep_out: return the output beside the gradients, so that all are in memory at the same time.
    """
    if direction == FORWARD:
        run = provider.bind(case)

        def forward() -> Tensor:
            with torch.no_grad():
                return run()

        return forward
    if not provider.checked:
        return _copy_both(case, keep_out)
    case = case.map(lambda t: t.detach().requires_grad_())
    wanted, grad, run = list(case.tensors().values()), case.grad.detach(), provider.bind(case)
    if not keep_out:
        return lambda: torch.autograd.grad(run(), wanted, grad)

    def both() -> tuple[Tensor, ...]:
        out = run()
        return (out.detach(), *torch.autograd.grad(out, wanted, grad))

    return both


def saved_bytes(provider: Provider, case: Inputs) -> int | None:
    """Return the bytes that a call keeps for its backward, beyond its inputs; None without one."""
    if not (provider.checked and BOTH in provider.directions):
        return None
    case = case.map(lambda t: t.detach().requires_grad_())
    return saved.saved_bytes(provider.bind(case), case.tensors().values())

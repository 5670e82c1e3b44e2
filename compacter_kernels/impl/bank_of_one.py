"""A routed bank of one adapter, on the kernel of a single adapter, so that it has the same bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compacter_kernels.calls import AdapterCall, BankCall
from compacter_kernels.impl import Gradients, Kernel
from compacter_kernels.impl.memory import check_all, readable
from compacter_kernels.problem import Problem


def serves(problem: Problem) -> bool:
    """Whether the problem is that of a routed bank of one Compacter adapter."""
    bank = problem.bank
    return problem.operation == "adapter" and bank is not None and bank.adapters == 1 and not bank.mixed


def single(problem: Problem) -> Problem:
    """The problem of the one adapter."""
    return problem._replace(bank=None)


class BankOfOne:
    """The adapter of all rows, in which those without an adapter take no part.

    kernel: that of the single adapter.
    """

    differentiable = norms = False

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def forward(self, call: Any, out: Tensor | None = None) -> Tensor:
        own, route = _single_call(call), _of_each_row(call)
        y = torch.where(route == 0, self.kernel.forward(own), _without_adapter(call))
        y = y.masked_fill((route < -1) | (route > 0), torch.nan)
        return y if out is None else out.copy_(y)

    def backward(self, call: Any, grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
        own, chosen = _single_call(call), _of_each_row(call) == 0
        # x, too, becomes 0: 0 times a row that is not finite would be NaN in the weights' gradients
        own, of_rows = own._replace(x=own.x.where(chosen, 0.0)), grad.where(chosen, 0.0)
        of_x, *of_weights = self.kernel.backward(own, of_rows, wanted[:-1])
        if of_x is not None:
            of_x = of_x.where(chosen, grad if call.add_x else 0.0)
        given = (*call.down, *call.up)
        return (of_x, *(g if g is None else g.view(t.shape) for g, t in zip(of_weights, given, strict=True)), None)


def _single_call(call: BankCall) -> AdapterCall:
    """The call of the one adapter with all rows."""
    check_all((*call.down.named("down"), *call.up.named("up")))  # before views are made of them
    return AdapterCall(call.x, call.down.adapter(0), call.up.adapter(0), call.residual, call.add_x, call.scale)


def _of_each_row(call: BankCall) -> Tensor:
    """The number of the adapter of each row, (..., 1)."""
    assert call.route is not None
    route = readable(call.route, "route")
    rows = call.x.shape[:-1]
    return route.repeat_interleave(rows.numel() // max(1, len(route)), output_size=rows.numel()).view(*rows, 1)


def _without_adapter(call: BankCall) -> Tensor:
    """What the adapter's result is added to; 0 if there is nothing."""
    if call.residual is None:
        return call.x if call.add_x else call.x.new_zeros(())
    return call.residual + call.x if call.add_x else call.residual

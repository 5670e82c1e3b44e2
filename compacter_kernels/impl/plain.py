"""Kernels made of torch's own operations, which autograd and torch.compile can see.

They compute in float32, as the fused kernels do, with one final rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from compacter_kernels import modes
from compacter_kernels.calls import AdapterCall, BankCall, Call, LinearCall, fake
from compacter_kernels.impl import Gradients
from compacter_kernels.impl.memory import Parameters, check_readable
from compacter_kernels.problem import Problem
from compacter_kernels.weights import PHMWeights, Weights

NO_AUTOCAST = ("meta", "lazy", "vulkan")  # the types for which torch refuses the question


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for this type of device."""
    kind = device.type  # is_autocast_available(kind) would say the same, but torch.compile of torch 2.6 cannot trace it
    return kind not in NO_AUTOCAST and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast for this type of device: matmuls keep their own dtype."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def wide(x: Tensor) -> Tensor:
    """x in float64 if it is float64, else in float32, so that H never has low precision."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def adapters_exist(route: Tensor, adapters: int) -> None:
    """Raise IndexError for a number in route that is no adapter, where the CPU can read it."""
    eager = not torch.compiler.is_compiling() and modes.alone() and not fake(route)
    if eager and route.device.type == "cpu" and route.numel():
        least, most = map(int, torch.aminmax(route))
        if least < -1 or most >= adapters:
            wrong = least if least < -1 else most
            raise IndexError(
                f"route has the adapter {wrong}; the bank has {adapters}: 0 to {adapters - 1}, or -1 for none"
            )


class Plain:
    """A `Kernel` of plain torch.

    rows: returns x, (..., in), as the wide tensor that project takes. project: x H + b.
    """

    differentiable, norms = True, False

    def __init__(
        self, problem: Problem, rows: Callable[[Tensor], Tensor], project: Callable[[Tensor, PHMWeights], Tensor]
    ) -> None:
        self.rows, self.project_phm = rows, project
        self.activation = None if problem.activation is None else problem.activation.function
        self.parameters = Parameters(problem)

    def check(self, call: Call) -> None:
        """Raise for a tensor without memory, which torch's own operations do not check."""
        check_readable(call.x, "x")
        added = call.base if isinstance(call, LinearCall) else call.residual
        if added is not None:
            check_readable(added, "base" if isinstance(call, LinearCall) else "residual")
        if isinstance(call, BankCall):
            check_readable(call.mix if call.route is None else call.route, "mix" if call.route is None else "route")  # type: ignore[arg-type]
            self.parameters.readable((*call.down, *call.up))
        else:
            self.parameters.readable(call.differentiable()[1:])

    def forward(self, call: Call, out: Tensor | None = None) -> Tensor:
        if autocasts(call.x.device):
            with without_autocast(call.x.device):
                result = self._compute(call)
        else:  # avoids the time to enter a context
            result = self._compute(call)
        return result if out is None else out.copy_(result)

    def backward(self, call: Call, grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
        """The gradients by autograd, for leaves that share the memory of the call's tensors."""
        call = call.map(Tensor.detach)
        leaves = call.differentiable()
        needed = [leaf.requires_grad_() for leaf, want in zip(leaves, wanted, strict=True) if want and leaf is not None]
        with torch.enable_grad(), without_autocast(call.x.device):
            out = self._compute(call)
        grads = iter(torch.autograd.grad(out, needed, grad) if needed else ())
        return tuple(next(grads) if leaf is not None and leaf.requires_grad else None for leaf in leaves)

    def project(self, rows: Tensor, weights: Weights) -> Tensor:
        """The projection of wide rows."""
        if isinstance(weights, PHMWeights):
            return self.project_phm(rows, weights)
        y = rows @ weights.weight.to(rows.dtype)
        return y if weights.bias is None else y + weights.bias.to(rows.dtype)

    def linear(self, call: LinearCall) -> Tensor:
        """[base +] scale * (x H + b), wide."""
        y = self.project(self.rows(call.x), call.weights)
        if call.scale != 1.0:
            y = y * call.scale
        return y if call.base is None else y + self.rows(call.base).reshape(y.shape)

    def adapter(self, rows: Tensor, down: Weights, up: Weights) -> Tensor:
        """up(act(down(x))) of wide rows."""
        assert self.activation is not None
        return self.project(self.activation(self.project(rows, down)), up)

    def routed(self, rows: Tensor, call: BankCall) -> Tensor:
        """The adapter of each row, (rows, k): a loop over all adapters."""
        assert call.route is not None
        adapters = call.down.slots()[1].shape[0]
        adapters_exist(call.route, adapters)
        of_row = call.route.repeat_interleave(rows.shape[0] // max(1, len(call.route)))[:, None]
        y = torch.zeros_like(rows).masked_fill((of_row < -1) | (of_row >= adapters), torch.nan)
        for index in range(adapters):
            own = self.adapter(rows, call.down.adapter(index), call.up.adapter(index))
            y = y + own.masked_fill(of_row != index, 0.0)
        return y

    def mixed(self, rows: Tensor, call: BankCall) -> Tensor:
        """The weighted sum of all adapters of each row, (rows, k)."""
        assert call.mix is not None
        weights = call.mix.to(rows.dtype).repeat_interleave(rows.shape[0] // max(1, len(call.mix)), 0)
        y = torch.zeros_like(rows)
        for index in range(weights.shape[1]):
            own = self.adapter(rows, call.down.adapter(index), call.up.adapter(index))
            y = y + weights[:, index, None] * own
        return y

    def _compute(self, call: Call) -> Tensor:
        x = call.x
        y = self.linear(call) if isinstance(call, LinearCall) else self._adapted(call)
        y = y.to(x.dtype)
        return y if y.ndim == x.ndim else y.reshape(*x.shape[:-1], y.shape[-1])

    def _adapted(self, call: AdapterCall | BankCall) -> Tensor:
        """The result of an adapter or a bank, wide."""
        x, rows = call.x, self.rows(call.x)
        if isinstance(call, BankCall):
            rows = rows.reshape(x.numel() // x.shape[-1], x.shape[-1])
            y = self.routed(rows, call) if call.mix is None else self.mixed(rows, call)
        else:
            y = self.adapter(rows, call.down, call.up)
        if call.scale != 1.0:
            y = y * call.scale
        if call.add_x:
            y = y + rows
        return y if call.residual is None else y + self.rows(call.residual).reshape(y.shape)


def unavailable() -> str | None:
    """Why an impl of plain torch cannot run in this process: None, since it always can."""
    return None


def refuses(problem: Problem) -> str | None:
    """Why an impl of plain torch cannot serve the problem: None, since it serves every one."""
    return None

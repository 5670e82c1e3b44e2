"""What the targets of csrc/ share: the arguments of a plan, and all of a call but its launch."""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor

from compacter_kernels.calls import AdapterCall, LinearCall
from compacter_kernels.impl import Gradients, empty_gradients
from compacter_kernels.impl.memory import Parameters, addresses, readable
from compacter_kernels.problem import Problem
from compacter_kernels.weights import NormWeights

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # csrc/adapter.h


def plan_arguments(problem: Problem) -> tuple[Any, ...]:
    """What every target's plan is made from.

    dtype of x, the activation of an adapter, (n, rank, in, out, has bias) of each projection, all parameter dtypes.
    """
    activation = [] if problem.activation is None else [problem.activation.code]
    shapes = [
        # index: under torch.compile a size may be a symbol, of which this asks the number
        (*map(index, (p.phm_dim, p.rank or 0, p.in_features, p.out_features)), p.dtypes[3] is not None)
        for p in problem.projections
    ]
    dtypes = tuple(_DTYPES[d or torch.float32] for p in problem.projections for d in p.dtypes)
    return (_DTYPES[problem.dtype], *activation, *shapes, dtypes)


class Kernel:
    """A plan of one target, which says how it is launched: with what between a call's arguments and its parameters.

    call: addresses and sizes. params: the addresses of the parameters, in backward of their gradients too; 0: none.
    """

    differentiable = norms = False

    def __init__(self, problem: Problem, plan: Any) -> None:
        self.plan, self.parameters = plan, Parameters(problem)
        self.width, self.out_features = problem.projections[0].in_features, problem.projections[-1].out_features

    def launch_forward(self, call: tuple[Any, ...], params: tuple[int, ...]) -> None:
        raise NotImplementedError

    def launch_backward(self, call: tuple[Any, ...], tokens: int, params: tuple[int, ...]) -> None:
        raise NotImplementedError


class Linear(Kernel):
    """phm_linear, a `Kernel` of `LinearCall` but for its launch."""

    def forward(self, call: LinearCall, out: Tensor | None = None) -> Tensor:
        x, weights = call
        x, (_, places) = readable(x, "x"), self.parameters.readable(weights)
        if out is None:
            out = x.new_empty((*x.shape[:-1], self.out_features))
        self.launch_forward((x.data_ptr(), out.data_ptr(), x.numel() // self.width), places)
        return out

    def backward(self, call: LinearCall, grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
        x, grad = readable(call.x, "x"), readable(grad, "the gradient of the output")
        params, places = self.parameters.readable(call.weights)
        results = empty_gradients([x, *params], wanted)
        grad_x, *grads = addresses(results)
        tokens = x.numel() // self.width
        self.launch_backward((x.data_ptr(), grad.data_ptr(), grad_x, tokens), tokens, (*places, *grads))
        return tuple(results)


class Adapter(Kernel):
    """compacter_adapter, a `Kernel` of `AdapterCall` but for its launch.

    adds_both: whether the target can add x besides a residual.
    """

    adds_both = False

    def forward(self, call: AdapterCall, out: Tensor | None = None) -> Tensor:
        x, down, up, residual, add_x, scale, norm = call
        x, (_, places) = readable(x, "x"), self.parameters.readable((*down, *up))
        if residual is not None:
            residual = readable(residual, "residual")
            if add_x and not self.adds_both:
                residual, add_x = residual + x, False
        if out is None:
            out = torch.empty_like(x)
        other = 0 if residual is None else residual.data_ptr()
        given = (x.data_ptr(), other, out.data_ptr(), add_x, x.numel() // self.width, scale)
        if norm is None:
            self.launch_forward(given, places)
        else:
            self.launch_normed(given, norm, out, places)
        return out

    def backward(self, call: AdapterCall, grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
        x, grad = readable(call.x, "x"), readable(grad, "the gradient of the output")
        params, places = self.parameters.readable((*call.down, *call.up))
        results = empty_gradients([x, *params], wanted)
        grad_x, *grads = addresses(results)
        tokens = x.numel() // self.width
        given = (x.data_ptr(), grad.data_ptr(), grad_x, call.add_x, tokens, call.scale)
        if call.norm is None:
            self.launch_backward(given, tokens, (*places, *grads))
        else:
            self.launch_normed_backward(given, call.norm, (*places, *grads))
        return tuple(results)

    def launch_normed(self, call: tuple[Any, ...], norm: NormWeights, out: Tensor, params: tuple[int, ...]) -> None:
        raise NotImplementedError

    def launch_normed_backward(self, call: tuple[Any, ...], norm: NormWeights, params: tuple[int, ...]) -> None:
        raise NotImplementedError

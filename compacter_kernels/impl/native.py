"""The part that all targets of csrc/ share: the arguments of a plan, a call up to its launch."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

import torch
from torch import Tensor

from compacter_kernels.calls import Call, LinearCall
from compacter_kernels.impl import Gradients, empty_gradients
from compacter_kernels.impl.memory import Parameters, addresses, readable
from compacter_kernels.problem import Problem, Projection

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # csrc/adapter.h


def plan_arguments(problem: Problem, transposed: tuple[bool, ...] = (False, False)) -> tuple[Any, ...]:
    """The arguments of every target's plan.

    They are the dtype of x, the activation of an adapter, of each projection (terms, n_in, n_out,
    rank, in, out, has bias, is transposed), and the dtypes of the four slots of each.
    """
    activation = [] if problem.activation is None else [problem.activation.code]
    shapes = [
        # Under torch.compile a size may be a symbol; index gives its number.
        (
            *map(index, (p.terms, p.n_in, p.n_out, p.rank or 0, p.in_features, p.out_features)),
            *(p.dtypes[-1] is not None, turned and not p.terms),
        )
        for p, turned in zip(problem.projections, transposed, strict=False)
    ]
    dtypes = tuple(DTYPES[d or torch.float32] for p in problem.projections for d in _slots(p))
    return (DTYPES[problem.dtype], *activation, *shapes, dtypes)


def _slots(p: Projection) -> tuple[torch.dtype | None, ...]:
    """The dtypes of rule, left, right and bias."""
    return p.dtypes if p.terms else (None, p.dtypes[0], None, p.dtypes[1])


class Kernel:
    """The base of each target's `Kernel`: a plan, which the subclass launches.

    launch_forward(call, params), launch_backward(call, tokens, params), and where norms is True
    launch_normed(call, norm, out, params) and launch_normed_backward(call, norm, params) take call,
    the addresses and sizes of a call, and params, the addresses of the parameters and, in backward,
    of their gradients; 0 if there is none.
    adds_both: whether the target can add both x and a residual.
    """

    differentiable = norms = adds_both = False
    launch_forward: Callable[..., None]
    launch_backward: Callable[..., None]
    launch_normed: Callable[..., None]
    launch_normed_backward: Callable[..., None]

    def __init__(self, problem: Problem, plan: Any) -> None:
        self.plan, self.parameters = plan, Parameters(problem)
        self.width, self.out_features = problem.projections[0].in_features, problem.projections[-1].out_features

    def forward(self, call: Call, out: Tensor | None = None) -> Tensor:
        norm = None
        if call.__class__ is LinearCall:
            x, weights, base, scale = call
            x, (_, params) = readable(x, "x"), self.parameters.readable(weights)
            if out is None:
                out = x.new_empty(*x.shape[:-1], self.out_features)  # in half the time of a tuple
            added = 0 if base is None else (base := readable(base, "base")).data_ptr()
            arguments: tuple[Any, ...] = (x.data_ptr(), added, out.data_ptr(), x.numel() // self.width, scale)
        else:
            x, down, up, residual, add_x, scale, norm = call  # type: ignore[misc]
            x, (_, params) = readable(x, "x"), self.parameters.readable((*down, *up))
            if residual is not None:
                residual = readable(residual, "residual")
                if add_x and not self.adds_both:
                    residual, add_x = residual + x, False
            if out is None:
                out = torch.empty_like(x)
            added = 0 if residual is None else residual.data_ptr()
            arguments = (x.data_ptr(), added, out.data_ptr(), add_x, x.numel() // self.width, scale)
        if norm is None:
            self.launch_forward(arguments, params)
        else:
            self.launch_normed(arguments, norm, out, params)
        return out

    def backward(self, call: Call, grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
        x, grad = readable(call.x, "x"), readable(grad, "the gradient of the output")
        tokens, norm = x.numel() // self.width, None
        if isinstance(call, LinearCall):
            params, given = self.parameters.readable(call.weights)
            options: tuple[Any, ...] = (tokens, call.scale)
        else:
            params, given = self.parameters.readable((*call.down, *call.up))
            options, norm = (call.add_x, tokens, call.scale), call.norm
        results = empty_gradients([x, *params], wanted)
        grad_x, *grads = addresses(results)
        arguments = (x.data_ptr(), grad.data_ptr(), grad_x, *options)
        if norm is None:
            self.launch_backward(arguments, tokens, (*given, *grads))
        else:
            self.launch_normed_backward(arguments, norm, (*given, *grads))
        return tuple(results)

"""Calls of dense projections and of banks, up to the launch of a target of csrc/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compacter_kernels.calls import AdapterCall, BankCall
from compacter_kernels.impl import Gradients, empty_gradients, native
from compacter_kernels.impl.memory import Parameters, addresses, check_memory, readable
from compacter_kernels.problem import Problem
from compacter_kernels.weights import LinearWeights, Weights


class Given:
    """The parameters of a call in memory: contiguous tensors, and which lie there transposed.

    The weight of an nn.Linear is the transposed one of LinearWeights, and is not copied. `slots`
    has four tensors for each projection.
    """

    def __init__(self, down: Weights, up: Weights, parameters: Parameters) -> None:
        dense = isinstance(down, LinearWeights)
        self.transposed = tuple(dense and not side[0].is_contiguous() for side in (down, up))
        given: list[Tensor | None] = [*down, *up]
        for index, turned in zip((0, len(down)), self.transposed, strict=True):
            if turned:
                weight = given[index]
                assert weight is not None
                try:
                    given[index] = weight.mT
                except RuntimeError:  # raised by torch for freed storage
                    check_memory(weight, parameters.names[index])
                    raise
        read, _ = parameters.readable(given)
        self.tensors = read
        self.slots = read if not dense else (None, read[0], None, read[1], None, read[2], None, read[3])

    def gradients(self, wanted: tuple[bool, ...]) -> tuple[list[Tensor | None], tuple[int, ...]]:
        """Memory for the wanted gradients, like the parameters, and its addresses as in slots."""
        grads = empty_gradients(self.tensors, wanted)
        half = len(grads) // 2
        of_slots = [grads[:half], grads[half:]]
        if half == 2:
            of_slots = [[None, weight, None, bias] for weight, bias in of_slots]
        results = list(grads)
        for index, turned in zip((0, half), self.transposed, strict=True):
            grad = results[index]
            if turned and grad is not None:
                results[index] = grad.mT
        return results, addresses([t for side in of_slots for t in side])


def _choice(call: AdapterCall | BankCall) -> tuple[tuple[Any, ...], Tensor | None]:
    """The argument of a bank and the tensor that it is made from; neither for a single adapter.

    The argument is (groups, address of route, address of mix, dtype of mix).
    """
    if not isinstance(call, BankCall):
        return (), None
    if call.mix is None:
        assert call.route is not None
        route = readable(call.route, "route")
        return ((len(route), route.data_ptr(), 0, 0),), route
    mix = readable(call.mix, "mix")
    return ((len(mix), 0, mix.data_ptr(), native.DTYPES[mix.dtype]),), mix


class FamilyKernel:
    """A `Kernel` of bottleneck adapters and of banks.

    make: the kernel of a target for weights that lie in memory like this, whose launch_forward and
    launch_backward are used. For a bank they get what `_choice` returns behind the other arguments,
    and backward the address of the gradient of mix.
    """

    differentiable = False

    def __init__(self, problem: Problem, make: Callable[[tuple[bool, ...]], native.Kernel]) -> None:
        self.make, self.parameters = make, Parameters(problem)
        self.width = problem.projections[0].in_features
        self.targets: dict[tuple[bool, ...], native.Kernel] = {}
        self.norms = problem.bank is None and self._target((False, False)).norms

    def _target(self, transposed: tuple[bool, ...]) -> native.Kernel:
        target = self.targets.get(transposed)
        if target is None:
            target = self.targets[transposed] = self.make(transposed)
        return target

    def forward(self, call: Any, out: Tensor | None = None) -> Tensor:
        x, given = readable(call.x, "x"), Given(call.down, call.up, self.parameters)
        target, residual, add_x = self._target(given.transposed), call.residual, call.add_x
        if residual is not None:
            residual = readable(residual, "residual")
            if add_x and not target.adds_both:
                residual, add_x = residual + x, False
        choice, kept = _choice(call)
        if out is None:
            out = torch.empty_like(x)
        added = 0 if residual is None else residual.data_ptr()
        arguments = (x.data_ptr(), added, out.data_ptr(), add_x, x.numel() // self.width, call.scale, *choice)
        if call.norm is None:
            target.launch_forward(arguments, addresses(given.slots))
        else:
            target.launch_normed(arguments, call.norm, out, addresses(given.slots))
        del kept  # the kernel has been launched with its address
        return out

    def backward(self, call: Any, grad: Tensor, wanted: tuple[bool, ...]) -> Gradients:
        x, grad = readable(call.x, "x"), readable(grad, "the gradient of the output")
        given = Given(call.down, call.up, self.parameters)
        target, tokens = self._target(given.transposed), x.numel() // self.width
        of_x = torch.empty_like(x) if wanted[0] else None
        results, grads = given.gradients(wanted[1 : 1 + len(given.tensors)])
        choice, mix = _choice(call)
        arguments = (x.data_ptr(), grad.data_ptr(), *addresses((of_x,)), call.add_x, tokens, call.scale, *choice)
        params = (*addresses(given.slots), *grads)
        if isinstance(call, BankCall):
            of_mix = torch.empty_like(mix) if wanted[-1] and mix is not None else None
            target.launch_backward((*arguments, *addresses((of_mix,))), tokens, params)
            return (of_x, *results, of_mix)
        if call.norm is None:
            target.launch_backward(arguments, tokens, params)
        else:
            target.launch_normed_backward(arguments, call.norm, params)
        return (of_x, *results)

"""The fused impls as torch.library operators, for torch.compile, torch.export and dispatch modes.

Each operator is one node of their graphs. Plain eager calls do not come here. `impl` names a fused
impl; those of plain torch need no operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compacter_kernels import dispatch
from compacter_kernels.calls import AdapterCall, BankCall, Call, LinearCall
from compacter_kernels.problem import Problem, adapter_problem, linear_problem
from compacter_kernels.weights import PHMWeights, from_slots

NO_SECOND_DERIVATIVE = (
    "the fused impls of compacter_kernels have no second derivative; call with impl='factored' for one"
)
_DOWN_UP = ", ".join(
    f"Tensor? {side}_rule, Tensor {side}_left, Tensor? {side}_right, Tensor? {side}_bias" for side in ("down", "up")
)
_kernels: dict[tuple[Problem, str], Any] = {}


class _Operation(NamedTuple):
    """How a call is the arguments of an operator: x, perhaps a tensor to add, tensors, options.

    added: the name of the tensor to add, or None. differentiable: how many of the tensors, the
    first ones, get a gradient. pack: the tensors and the options of a call; unpack: the problem and
    the call of arguments.
    """

    name: str
    added: str | None
    tensors: str
    differentiable: int
    options: str
    pack: Callable[[Any, Problem], tuple[Any, ...]]
    unpack: Callable[..., tuple[Problem, Call]]


def _unpack_linear(x: Tensor, base: Tensor | None, *rest: Any) -> tuple[Problem, Call]:
    weights, scale = PHMWeights(*rest[:4]), (*rest[4:], 1.0)[0]
    return linear_problem(x, weights, base), LinearCall(x, weights, base, scale)


def _unpack_adapter(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Problem, Call]:
    down, up, (add_x, activation, scale) = from_slots(*rest[:4]), from_slots(*rest[4:8]), rest[8:]
    return adapter_problem(x, down, up, activation), AdapterCall(x, down, up, residual, add_x, scale)


def _unpack_bank(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Problem, Call]:
    down, up, (mix, route, add_x, activation, scale) = from_slots(*rest[:4]), from_slots(*rest[4:8]), rest[8:]
    problem = adapter_problem(x, down, up, activation, rest[1].shape[0], mix is not None)
    return problem, BankCall(x, down, up, residual, add_x, scale, None, route, mix)


def _options(call: AdapterCall | BankCall, problem: Problem) -> tuple[Any, ...]:
    assert problem.activation is not None
    return call.add_x, problem.activation.name, call.scale


_PHM = "Tensor rule, Tensor left, Tensor right, Tensor? bias"
_ADAPTER_OPTIONS = "bool add_x, str activation, float scale"
LINEAR = _Operation("phm_linear", None, _PHM, 4, "", lambda call, _: call.weights, _unpack_linear)
KRONECKER = _Operation(
    *("kronecker_linear", "base", _PHM, 4, "float scale"),
    lambda call, _: (*call.weights, call.scale),
    _unpack_linear,
)
ADAPTER = _Operation(
    *("adapter", "residual", _DOWN_UP, 8, _ADAPTER_OPTIONS),
    lambda call, problem: (*call.down.slots(), *call.up.slots(), *_options(call, problem)),
    _unpack_adapter,
)
BANK = _Operation(
    *("adapter_bank", "residual", f"{_DOWN_UP}, Tensor? mix, Tensor? route", 9, _ADAPTER_OPTIONS),
    lambda call, problem: (*call.down.slots(), *call.up.slots(), call.mix, call.route, *_options(call, problem)),
    _unpack_bank,
)


def _kernel_and_call(operation: _Operation, x: Tensor, added: Tensor | None, *rest: Any) -> tuple[Any, Call]:
    """The kernel and the call of an operator. rest: its tensors and options, and the impl."""
    *arguments, impl = rest
    problem, call = operation.unpack(x, added, *arguments)
    kernel = _kernels.get((problem, impl))
    if kernel is None:
        kernel = _kernels[problem, impl] = dispatch.plan(problem, impl).kernel
    return kernel, call


def _define(operation: _Operation) -> Callable[..., Tensor]:
    """Define an operator and its backward."""
    tensors, options = operation.tensors, ", ".join(filter(None, (operation.options, "str impl")))
    count, differentiable = tensors.count("Tensor"), operation.differentiable
    added = f"Tensor? {operation.added}, " if operation.added else ""

    @torch.library.custom_op(
        f"compacter_kernels::{operation.name}",
        mutates_args=(),
        schema=f"(Tensor x, {added}{tensors}, {options}) -> Tensor",
    )
    def operator(x: Tensor, *args: Any) -> Tensor:
        kernel, call = _kernel_and_call(operation, x, *(args if added else (None, *args)))
        result: Tensor = kernel.forward(call)
        return result

    @operator.register_fake
    def _(x: Tensor, *args: Any) -> Tensor:
        if operation.options.startswith("bool"):  # an adapter
            return torch.empty_like(x, memory_format=torch.contiguous_format)
        rule, _, right = args[bool(added) :][:3]
        return x.new_empty((*x.shape[:-1], rule.shape[2] * right.shape[2]))

    @torch.library.custom_op(
        f"compacter_kernels::{operation.name}_backward",
        mutates_args=(),
        schema=f"(Tensor grad, Tensor x, {tensors}, {options}) -> Tensor[]",
    )
    def backward(grad: Tensor, x: Tensor, *args: Any) -> list[Tensor]:
        """All gradients, an empty tensor for an absent one: operators return only tensors."""
        kernel, call = _kernel_and_call(operation, x, None, *args)
        leaves = call.differentiable()
        grads = kernel.backward(call, grad, tuple(leaf is not None for leaf in leaves))
        present = iter([g.contiguous() for g in grads if g is not None])
        return [x.new_empty(0) if t is None else next(present) for t in (x, *args[:differentiable])]

    @backward.register_fake
    def _(grad: Tensor, *args: Any) -> list[Tensor]:
        x, layout = args[0], torch.contiguous_format
        tensors = args[: 1 + differentiable]
        return [x.new_empty(0) if t is None else torch.empty_like(t, memory_format=layout) for t in tensors]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *rest = inputs
        ctx.added = [rest.pop(0) is not None] if added else []
        ctx.options = rest[count:]
        ctx.save_for_backward(x, *rest[:count])

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        grads = backward(grad, *tensors, *ctx.options)
        grad_x, *others = [None if t is None else g for g, t in zip(grads, tensors, strict=False)]
        of_added = [grad if present else None for present in ctx.added]
        return (grad_x, *of_added, *others, *[None] * (count - differentiable + len(ctx.options)))

    def differentiate_twice(ctx: Any, *_: Any) -> None:
        raise RuntimeError(NO_SECOND_DERIVATIVE)

    operator.register_autograd(differentiate, setup_context=save)
    backward.register_autograd(differentiate_twice)
    return operator


_OPERATORS = {operation.name: _define(operation) for operation in (LINEAR, KRONECKER, ADAPTER, BANK)}


def forward(call: Call, problem: Problem, impl: str) -> Tensor:
    """Run the call through its operator."""
    if isinstance(call, LinearCall):
        operation = LINEAR if call.base is None and call.scale == 1.0 else KRONECKER
    else:
        operation = BANK if isinstance(call, BankCall) else ADAPTER
    added = [] if operation.added is None else [call[2] if isinstance(call, LinearCall) else call.residual]
    return _OPERATORS[operation.name](call.x, *added, *operation.pack(call, problem), impl)

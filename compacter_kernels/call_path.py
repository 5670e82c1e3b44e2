"""The way of a call down to its kernel.

An ordinary call goes straight to the kernel, or through autograd where a gradient is recorded.
Where a tracer, a mode or a transform takes part (`modes`), or a tensor has a class of its own,
torch must see the call: a fused impl then runs as its operator, and "auto" takes an impl of plain
torch where no operator can serve. The way is chosen once for all calls of one signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compacter_kernels import autograd, dispatch, modes, ops
from compacter_kernels.calls import AdapterCall, BankCall, Call, LinearCall, explain_failure, fake, ordinary
from compacter_kernels.impl.memory import NoStorageError, check_all, check_for_torch
from compacter_kernels.impl.module import TENSORS
from compacter_kernels.impl.plain import Plain
from compacter_kernels.private import ENVIRON, environment_key
from compacter_kernels.problem import Problem, adapter_problem, check_like, check_norm, linear_problem

Activation = str | Callable[[Tensor], Tensor] | None
_plans: dict[Any, dispatch.Plan] = {}
_facts = attrgetter("shape", "dtype", "device")
_described = None if TENSORS is None else TENSORS.signature  # a quarter of the time of Python
_variable = environment_key(dispatch.ENVIRONMENT)


def run(call: Call, activation: Activation, out: Tensor | None, impl: str) -> Tensor:
    """The result of a call, in `out` where one is given."""
    if torch.compiler.is_compiling() or not modes.alone():
        plan = _plan(call, activation, impl)
    else:
        try:
            x, chosen = call[0], ENVIRON.get(_variable) if impl == "auto" else None
            key = (x.__class__, x.shape[-1], x.dtype, x.device, _signature(call), activation, impl, chosen)
            known = _plans.get(key)
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
            known = key = None  # the checks in _plan say what is wrong
        plan = _plan(call, activation, impl) if known is None else known
        if known is None and key is not None and plan.final and not callable(activation):
            _plans[key] = plan
    if out is not None or (call.__class__ is not LinearCall and call[6] is not None):  # type: ignore[misc]
        return _with_options(plan, call, activation, out)
    return _without_options(plan, call)


def _without_options(plan: dispatch.Plan, call: Call) -> Tensor:
    """The result of a call without `out` and norm, or with a norm that the kernel computes."""
    kernel = plan.kernel
    if kernel is None or plan.foreign:
        return _through_torch(plan, call)
    try:
        if not kernel.differentiable:
            if torch.is_grad_enabled() and _requires_grad(call):
                return autograd.forward(kernel, call)
        elif isinstance(kernel, Plain) and not plan.visible:
            kernel.check(call)
        return kernel.forward(call)
    except NoStorageError:
        return _without_options(plan, _looked_through(call))


def _looked_through(call: Call) -> Call:
    """The same call on the tensors inside the wrappers that a finished transform left around them.

    torch's own operations look through such a wrapper. Any other tensor without storage raises.
    """
    _problem(call, "identity")  # checks what a plan takes for granted, such as the layout of weights
    if not isinstance(call, LinearCall) and call.residual is not None:
        check_like(call.residual, "residual", call.x, call.x.shape)
    unwrapped = call.map(lambda t: t.view_as(t))
    check_all(unwrapped.named())
    return unwrapped


def explain(call: Call, activation: Activation, out: Tensor | None, impl: str) -> dispatch.Explanation:
    """The impl that `run` takes, and why. Raises what `run` raises before it computes."""
    problem = _problem(call, activation)
    if out is not None:
        _check_out(out, call)
    return dispatch.explain(problem, impl, _only_torch(call))


def _signature(call: Call) -> tuple[Any, ...]:
    """All properties of the other tensors that the checks depend on. Every call computes it."""
    if call.__class__ is LinearCall:
        _, weights, base, _ = call
        described = (_described and _described(weights)) or _of_each(weights)
        if base is None:
            return (weights.__class__, described)
        return (weights.__class__, described, base.__class__, _facts(base)[1:], base.shape[-1])
    down: Any
    up: Any
    down, up, residual, norm = call[1], call[2], call[3], call[6]  # type: ignore[misc]
    params = (*down, *up)
    described = (_described and _described(params)) or _of_each(params)
    found: tuple[Any, ...] = (down.__class__, up.__class__, residual.__class__, described)
    if norm is not None:
        found = (*found, norm.__class__, _of_each(norm[:2]))
    if call.__class__ is BankCall:
        route, mix = call[7], call[8]
        of_mix = None if mix is None else (mix.__class__, mix.dtype, mix.device, mix.shape[-1])
        return (*found, None if route is None else (route.__class__, route.device), of_mix)
    return found


def _of_each(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    return tuple([None if t is None else (t.__class__, _facts(t)) for t in tensors])


def _problem(call: Call, activation: Activation) -> Problem:
    """The problem of a call, checked."""
    if isinstance(call, LinearCall):
        return linear_problem(call.x, call.weights, call.base)  # torch.compile of torch 2.6 cannot take a slice of it
    bank = (call.down.slots()[1].shape[0], call.mix is not None) if isinstance(call, BankCall) else ()
    problem = adapter_problem(call.x, call.down, call.up, activation, *bank)  # type: ignore[arg-type]
    if call.norm is not None:
        check_norm(call.norm, call.x)
    return problem


def _plan(call: Call, activation: Activation, impl: str) -> dispatch.Plan:
    """Check the call, and choose its way."""
    problem, foreign = _problem(call, activation), any(not ordinary(tensor) for _, tensor in call.named())
    visible = foreign or torch.compiler.is_compiling() or not modes.alone()
    return dispatch.plan(problem, impl, _only_torch(call), visible, foreign)


def _only_torch(call: Call) -> dispatch.OnlyTorch | None:
    """Why only an impl of plain torch can serve the call, or None."""
    kinds = [f"{name} is a {type(t).__name__}" for name, t in call.named() if not (ordinary(t) or fake(t))]
    if kinds:
        return dispatch.OnlyTorch(", ".join(kinds), False)
    if torch.compiler.is_dynamo_compiling():
        return None
    if modes.transformed():
        why = "a transform of torch.func or forward-mode AD is active, for which the kernels have no rule"
        return dispatch.OnlyTorch(why, True)
    if modes.only_torch_operators():
        return dispatch.OnlyTorch("torch.jit.trace and torch.onnx.export record torch's own operators", False)
    return None


def _requires_grad(call: Call) -> bool:
    if call[0].requires_grad:
        return True
    tensors: Any
    if call.__class__ is AdapterCall:
        tensors = (*call[1], *call[2], call[3])
    elif call.__class__ is LinearCall:
        tensors = (*call[1], call[2])
    else:
        tensors = (*call[1], *call[2], call[3], call[8])  # type: ignore[misc]
    for tensor in tensors:  # noqa: SIM110  any() takes twice the time
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _through_torch(plan: dispatch.Plan, call: Call) -> Tensor:
    """The result of a call that torch must see."""
    try:
        if plan.kernel is None:
            return ops.forward(call, plan.problem, plan.name)
        return plan.kernel.forward(call)
    except Exception as error:
        if not all(fake(tensor) for _, tensor in call.named()):
            explain_failure(call.named(), error)
        raise


def _with_options(plan: dispatch.Plan, call: Call, activation: Activation, out: Tensor | None) -> Tensor:
    """The result of a call with an `out`, a norm, or both."""
    if out is not None:
        _check_out(out, call)
    if not isinstance(call, LinearCall) and call.norm is not None and not _takes_norm(plan, call):
        weight, bias, eps, *_ = call.norm
        check_for_torch([("norm.weight", weight), ("norm.bias", bias)])
        y = run(call._replace(norm=None), activation, None, plan.name)
        try:
            result = F.layer_norm(y, weight.shape, weight, bias, eps)
        except Exception as error:
            explain_failure(call.named(), error)
            raise
    elif out is not None and _writes_into(plan, call, out):
        assert plan.kernel is not None
        torch.autograd.graph.increment_version(out)  # whoever saved it for a backward gets an error, as of copy_
        return plan.kernel.forward(call, out)
    else:
        result = _without_options(plan, call)
    if out is None:
        return result
    try:
        return out.copy_(result)
    except Exception as error:
        explain_failure([("out", out)], error)
        raise


def _takes_norm(plan: dispatch.Plan, call: AdapterCall | BankCall) -> bool:
    """Whether the kernel computes the norm: it is frozen, and a second derivative still raises."""
    norm = call.norm
    if plan.kernel is None or not plan.kernel.norms or norm is None or isinstance(call, BankCall):
        return False
    if not torch.is_grad_enabled():
        return True
    if norm.weight.requires_grad or norm.bias.requires_grad:
        return False
    without = call._replace(residual=None)
    return call.residual is None or not call.residual.requires_grad or _requires_grad(without)


def _check_out(out: Tensor, call: Call) -> None:
    x = call.x
    like = isinstance(out, Tensor) and not out.is_nested and out.layout == x.layout and _facts(out) == _facts(x)
    if not like:
        _problem(call, "identity")  # what is wrong with x comes first
        check_like(out, "out", x, x.shape)
    if torch.is_grad_enabled() and (out.requires_grad or _requires_grad(call)):
        raise ValueError("out= records no gradient; call under torch.no_grad(), or without out=")
    check_for_torch([("out", out)])


def _writes_into(plan: dispatch.Plan, call: Call, out: Tensor) -> bool:
    """Whether a kernel can write into `out`: it is contiguous, and no input shares its memory."""
    if plan.kernel is None or plan.kernel.differentiable or not ordinary(out):
        return False
    if not out.is_contiguous() or out.is_neg():
        return False
    parts = [part if isinstance(part, tuple) else (part,) for part in call]
    read = [t.untyped_storage() for part in parts for t in part if isinstance(t, Tensor)]
    written = out.untyped_storage()
    begin = written.data_ptr()
    end = begin + written.nbytes()
    for storage in read:  # one that begins elsewhere may overlap, too
        address = storage.data_ptr()
        if address < end and begin < address + storage.nbytes():
            return False
    return True

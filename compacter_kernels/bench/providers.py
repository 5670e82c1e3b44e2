"""The providers: every timed way to compute the adapter, and the copy they are compared with.

The adapters named `lowp` cast the weights to the dtype of x and compute everything in it, as a user
would who accepts the error: H in bfloat16, for example, keeps 8 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import compacter_kernels as ck
from compacter_kernels import saved
from compacter_kernels.activations import resolve
from compacter_kernels.bench.cost import BOTH, DIRECTIONS, FORWARD
from compacter_kernels.cases import Case, Inputs, Shape
from compacter_kernels.dispatch import IMPLS, PLAIN
from compacter_kernels.impl import dense, factored
from compacter_kernels.problem import adapter_problem
from compacter_kernels.weights import PHMWeights

Call = Callable[[], Tensor]
Formula = Callable[..., Tensor]  # of x and of the weights
Adapter = Callable[[Tensor, PHMWeights, PHMWeights, str], Tensor]  # x, down, up, activation; the residual is x


class Provider(NamedTuple):
    """bind(case) prepares whatever is not timed, and returns the call that is.

    checked: False for the copy, which computes no adapter and passes no gate. loose: True where it
    computes in the dtype of x, which is beyond the contract's error; the gate has a second limit
    for it. compiled: True where it goes through torch.compile. formula: where the call has weights
    of its own (OwnWeights), the same function in plain torch. method: the kind of adapter.
    """

    name: str
    bind: Callable[[Inputs], Call]
    directions: tuple[str, ...] = DIRECTIONS
    checked: bool = True
    loose: bool = False
    compiled: bool = False
    formula: Formula | None = None
    method: str = "Compacter"


class OwnWeights:
    """A call of a module with weights of its own. leaves: x and the trained weights."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, weights: tuple[Tensor, ...]) -> None:
        self.function, self.x, self.leaves = function, x, [x, *weights]

    def __call__(self) -> Tensor:
        """Return the output."""
        return self.function(self.x)


def leaves(call: Call, case: Inputs) -> list[Tensor]:
    """Return the tensors whose gradients a training step asks of the call."""
    return call.leaves if isinstance(call, OwnWeights) else list(case.tensors().values())


def _arguments(case: Inputs) -> tuple[Tensor, PHMWeights, PHMWeights, str]:
    assert isinstance(case.down, PHMWeights) and isinstance(case.up, PHMWeights) and case.residual is case.x
    return case.x, case.down, case.up, case.activation


def through(impl: str) -> Adapter:
    """Return the public function through that impl."""

    def adapter(x: Tensor, down: PHMWeights, up: PHMWeights, activation: str) -> Tensor:
        return ck.compacter_adapter(x, down, up, activation=activation, residual=x, impl=impl)

    return adapter


def _lowp(project: Callable[[Tensor, PHMWeights], Tensor]) -> Adapter:
    def adapter(x: Tensor, down: PHMWeights, up: PHMWeights, activation: str) -> Tensor:
        return x + project(resolve(activation).function(project(x, down)), up)

    return adapter


def eager(adapter: Adapter) -> Callable[[Inputs], Call]:
    """Bind the adapter to a case as it is."""
    return lambda case: functools.partial(adapter, *_arguments(case))


def _compiled_for_each_cell(adapter: Adapter) -> Callable[[Inputs], Call]:
    def bind(case: Inputs) -> Call:
        arguments = _arguments(case)
        return torch.compile(lambda: adapter(*arguments), fullgraph=True, dynamic=False)

    return bind


def _compiled_once(adapter: Adapter) -> Callable[[Inputs], Call]:
    """Compile the adapter once for all token counts; T=1 is refused."""
    compiled = functools.cache(lambda: torch.compile(adapter, fullgraph=True))

    def bind(case: Inputs) -> Call:
        if case.x.shape[0] == 1:
            raise RuntimeError("T=1 would be compiled once more; its time is the host's, as at the next token count")
        call = functools.partial(compiled(), *_arguments(case))
        torch._dynamo.maybe_mark_dynamic(case.x, 0)
        return call

    return bind


def _dense_cached(case: Inputs, lowp: bool = False) -> Call:
    """Build H before the timing; compute in the dtype of x with lowp, else at least in float32."""
    x, down, up, name = _arguments(case)
    assert down.bias is not None and up.bias is not None
    activation = resolve(name).function
    dtype = x.dtype if lowp else torch.promote_types(x.dtype, torch.float32)
    parts = (ck.phm_matrix(down), down.bias, ck.phm_matrix(up), up.bias)
    down_matrix, down_bias, up_matrix, up_bias = (part.to(dtype) for part in parts)

    def run() -> Tensor:
        y = torch.addmm(up_bias, activation(torch.addmm(down_bias, x.to(dtype), down_matrix)), up_matrix)
        return (y + x).to(x.dtype)

    return run


def _fused(device: str) -> dict[str, str | None]:
    """Return every fused impl, and why it does not serve that device in this process."""
    x, down, up, activation = _arguments(Case.of(Shape(24, 12, 4), 1).inputs())
    problem = adapter_problem(x, down, up, activation)._replace(device=torch.device(device))
    available = ck.available_impls()
    return {name: available[name] or IMPLS[name].refuses(problem) for name in IMPLS if name not in PLAIN}


def missing(device: str = "cpu") -> dict[str, str]:
    """Return the fused impls that this process cannot run on the device, and why."""
    return {name: reason for name, reason in _fused(device).items() if reason is not None}


def providers(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Provider]:
    """Return all providers of the device by name; those in low precision if x has 16 bits."""
    plain = {name: through(name) for name in ("dense", "factored")}
    fused = {name: through(name) for name, reason in _fused(device).items() if reason is None}
    lowp = {"dense-lowp": _lowp(dense._project), "factored-lowp": _lowp(factored._project)}
    table = [
        Provider("copy", lambda case: case.x.clone, checked=False),
        Provider("dense", eager(plain["dense"])),
        Provider("dense-cached", _dense_cached, (FORWARD,)),
        Provider("factored", eager(plain["factored"])),
    ]
    if device == "cpu":
        table.append(Provider("factored-compiled", _compiled_for_each_cell(plain["factored"]), compiled=True))
    table += [Provider(name, eager(adapter)) for name, adapter in fused.items()]
    if device == "cuda":
        compiled = plain
        if dtype.itemsize == 2:
            table += [Provider(name, eager(adapter), loose=True) for name, adapter in lowp.items()]
            cached = functools.partial(_dense_cached, lowp=True)
            table.append(Provider("dense-cached-lowp", cached, (FORWARD,), loose=True))
            compiled = plain | lowp
        for name, adapter in compiled.items():
            table.append(Provider(f"{name}-compiled", _compiled_once(adapter), loose=name in lowp, compiled=True))
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
    grad, run = case.grad.detach(), provider.bind(case)
    wanted = leaves(run, case)
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
    call = provider.bind(case)
    return saved.saved_bytes(call, leaves(call, case))

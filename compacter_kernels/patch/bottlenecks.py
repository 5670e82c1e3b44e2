"""Whole adapters of OpenDelta, T-Few and the original: down_sampler, activation, up_sampler.

They look alike from outside, but some add x and some do not; so a copy with random weights is asked what it computes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compacter_kernels.functional import compacter_adapter, phm_linear
from compacter_kernels.patch import phm_modules
from compacter_kernels.patch.fused_names import fused_name, written_out
from compacter_kernels.patch.instances import hooked

METHODS = ("forward", "post_forward")  # the second is OpenDelta's, called with what the adapted module returned
PARTS = {"down_sampler", "up_sampler", "activation"}


class Fused(NamedTuple):
    """What a whole adapter computes: its method, its activation by name (None: its own, called), whether x is added."""

    method: str
    activation: str | None
    residual: bool


def is_bottleneck(module: nn.Module) -> bool:
    """Whether this is an adapter of two PHM layers of these libraries."""
    down, up = getattr(module, "down_sampler", None), getattr(module, "up_sampler", None)
    return phm_modules.is_projection(down) and phm_modules.is_projection(up) and callable(module.activation)


def is_not_built_yet(module: nn.Module) -> bool:
    """Whether this is an adapter of OpenDelta that makes its layers in its first call."""
    return getattr(module, "instantiated", None) is False and hasattr(module, "hypercomplex_division")


def run(adapter: Any, x: Tensor, activation: str | None, residual: bool) -> Tensor:
    """up(act(down(x))) [+ x] in one kernel."""
    return compacter_adapter(
        x,
        phm_modules.weights(adapter.down_sampler),
        phm_modules.weights(adapter.up_sampler),
        activation=activation or adapter.activation,
        residual=x if residual else None,
    )


def _parts(adapter: Any) -> list[nn.Module]:
    """The modules whose calls the kernel replaces."""
    parts = [adapter.down_sampler, adapter.up_sampler]
    return [*parts, *adapter.activation.modules()] if isinstance(adapter.activation, nn.Module) else parts


def forward(adapter: nn.Module, x: Tensor, *, activation: str | None, residual: bool) -> Tensor:
    """Instead of HyperComplexAdapter.forward."""
    if hooked(*_parts(adapter)):
        plain: Tensor = type(adapter).forward(adapter, x)
        return plain
    return run(adapter, x, activation, residual)


def post_forward(adapter: Any, output: Any, *, activation: str | None, residual: bool) -> Any:
    """Instead of OpenDelta's: a tensor, or a tuple whose first item is the hidden states."""
    x = output[0] if isinstance(output, tuple) else output
    if not isinstance(x, Tensor) or hooked(*_parts(adapter)):
        return type(adapter).post_forward(adapter, output)
    y = run(adapter, x, activation, residual)
    return (y, *output[1:]) if isinstance(output, tuple) else y


def _drawn_anew(module: nn.Module) -> Any:
    """A copy on the CPU in float64 with random weights, which shares nothing with the module."""
    twin = copy.deepcopy(module).to_empty(device="cpu").double()
    for part in twin.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(part, name).clear()
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                vars(part)[name] = torch.randn(value.shape, dtype=torch.float64)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.normal_()
    return twin


def _agree(call: Callable[[], Any], expected: Tensor) -> bool:
    torch.manual_seed(1)
    found = call()
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-8)


def probe_projection(layer: nn.Module) -> str | None:
    """Why the layer's forward is not y = x H + b, or None if it is."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            twin = _drawn_anew(layer)
            x = torch.randn(2, 3, twin.in_features, dtype=torch.float64)
            expected = phm_linear(x, phm_modules.weights(twin))
            if _agree(lambda: type(twin).forward(twin, x), expected):
                return None
    except (
        Exception
    ) as error:  # anything may go wrong in code of others; the layer is left as it is then, and why is said
        return f"asking its forward failed: {type(error).__name__}: {error}"
    return "its forward computes something else than x H + b"


def probe(adapter: nn.Module) -> Fused | str:
    """What the adapter computes, or why that is not known."""
    others = {name for name, child in adapter.named_children() if child is not None} - PARTS
    if others:
        return f"it also holds {', '.join(sorted(others))}"
    methods = [name for name in METHODS if _defines(adapter, name)]
    if len(methods) != 1:
        return f"it has {len(methods)} of the methods {' and '.join(METHODS)}"
    (method,) = methods
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return _ask(adapter, method)
    except Exception as error:  # as above
        return f"asking its {method} failed: {type(error).__name__}: {error}"


def _defines(adapter: nn.Module, name: str) -> bool:
    method = getattr(type(adapter), name, None)
    return method is not None and method is not nn.Module.forward


def _ask(adapter: nn.Module, method: str) -> Fused | str:
    twin = _drawn_anew(adapter)
    x = torch.randn(2, 3, twin.down_sampler.in_features, dtype=torch.float64)
    inner = getattr(twin.activation, "f", twin.activation)  # the wrappers of activations have it in f
    names = (fused_name(twin.activation), fused_name(inner), written_out(inner))
    for activation in dict.fromkeys((*(name for name in names if name), None)):
        for residual in (False, True):
            same = True
            for training in (False, True):  # a dropout in its forward shows in training only
                twin.train(training)
                torch.manual_seed(1)
                expected = run(twin, x, activation, residual)
                same &= _agree(lambda: getattr(type(twin), method)(twin, x), expected)
            if same:
                return Fused(method, activation, residual)
    return f"its {method} computes something else than up(act(down(x))), with or without + x"

"""PHM layers, and whole adapters of two of them, of OpenDelta, T-Few and the original repository.

The layers, also those of `adapters`, are recognised by their attributes, which are those of
PHMLinear in rabeehk/compacter. Only `factorized_phm` has another name in `adapters`.

The classes of adapters look alike, but some add x and some do not. So `_probe` compares a copy that
has random weights with each function that the kernel can compute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from compacter_kernels.functional import compacter_adapter, phm_linear
from compacter_kernels.nn import PHMLinear
from compacter_kernels.patch.activation_names import fused_name, name_by_values
from compacter_kernels.patch.methods import put, replaced_by_others, runs_more
from compacter_kernels.private import hook_tables, parameter
from compacter_kernels.weights import PHMWeights, factorised_rule

ATTRIBUTES = ("in_features", "out_features", "phm_dim", "learn_phm", "factorized_phm_rule", "shared_phm_rule", "b")
Kernel = Callable[..., Tensor]
Options = dict[str, Any]
METHODS = ("forward", "post_forward")  # OpenDelta calls post_forward with the output of the adapted module


def is_phm_layer(module: Any) -> bool:
    """Whether this is a PHM layer of another library, built like the original PHMLinear."""
    return (
        isinstance(module, nn.Module)
        and not isinstance(module, PHMLinear)
        and all(hasattr(module, name) for name in ATTRIBUTES)
        and (hasattr(module, "factorized_phm") or hasattr(module, "factorized_phm_W"))
    )


def is_adapter(module: nn.Module) -> bool:
    """Whether this is an adapter of two PHM layers, not of the library `adapters`."""
    down, up = getattr(module, "down_sampler", None), getattr(module, "up_sampler", None)
    return is_phm_layer(down) and is_phm_layer(up) and callable(module.activation)


def _factorised(layer: Any) -> bool:
    """Whether W is W_left W_right."""
    if "factorized_phm_W" in vars(layer):  # `adapters`, where a search for the other name takes long
        return bool(layer.factorized_phm_W)
    return bool(layer.factorized_phm if hasattr(layer, "factorized_phm") else layer.factorized_phm_W)


def weights(layer: Any, rules: Any, factors: Any, name: str = "W") -> PHMWeights:
    """The weights of the layer, read in every call: a checkpoint or a shared rule may replace them.

    rules, factors: the modules that hold the rule and, under this name, W; often the layer itself.
    """
    if layer.factorized_phm_rule:
        rule = factorised_rule(parameter(rules, "phm_rule_left"), parameter(rules, "phm_rule_right"))
    else:
        rule = parameter(rules, "phm_rule")
    bias = parameter(layer, "b")
    if _factorised(layer):
        return PHMWeights(rule, parameter(factors, f"{name}_left"), parameter(factors, f"{name}_right"), bias)
    return PHMWeights(rule, parameter(factors, name), None, bias)


def forward(layer: nn.Module, x: Tensor, phm_rule: Any = None) -> Tensor:
    """Instead of PHMLinear.forward, where phm_rule has no effect either."""
    return phm_linear(x, weights(layer, layer, layer))


def call(adapter: Any, value: Any, *, method: str, activation: str | None, residual: bool) -> Any:
    """Instead of the method of a class of adapters.

    value: x, or for OpenDelta's post_forward also a tuple whose first item is x.
    activation: a name of `activations.FUSED`, or None, where the adapter's own is called.
    """
    x = value[0] if method == "post_forward" and isinstance(value, tuple) else value
    inner = [adapter.down_sampler, adapter.up_sampler]
    if isinstance(adapter.activation, nn.Module):
        inner += adapter.activation.modules()
    if not isinstance(x, Tensor) or runs_more(*inner):
        return getattr(type(adapter), method)(adapter, value)
    y = _in_one_kernel(adapter, x, activation, residual)
    return y if x is value else (y, *value[1:])


def _in_one_kernel(adapter: Any, x: Tensor, activation: str | None, residual: bool) -> Tensor:
    """up(act(down(x))) [+ x]."""
    down, up = adapter.down_sampler, adapter.up_sampler
    act, added = activation or adapter.activation, x if residual else None
    return compacter_adapter(x, weights(down, down, down), weights(up, up, up), activation=act, residual=added)


def patch_module(module: nn.Module) -> tuple[bool, str] | None:
    """Whether the module is patched and how, or why not; None where there is nothing to report."""
    if is_adapter(module):
        return _patch_adapter(module)
    if getattr(module, "instantiated", None) is False and hasattr(module, "hypercomplex_division"):  # OpenDelta
        return False, "it makes its layers in its first call; patch after that"
    if isinstance(module, PHMLinear):
        return False, "it is one of compacter_kernels"
    if not is_phm_layer(module):
        return None
    if replaced_by_others(module, "forward"):
        return False, "its forward was replaced on the module"
    if unset := _unset(module):
        return False, f"{unset} have not been set yet"
    options = _probe(module, "forward", "x H + b", forward, [{}])
    if isinstance(options, str):
        return False, options
    put(module, "forward", forward)
    return True, "one kernel for the layer"


def _patch_adapter(adapter: Any) -> tuple[bool, str]:
    if unset := _unset(adapter.down_sampler, adapter.up_sampler):
        return False, f"{unset} of its layers have not been set yet"
    if any(replaced_by_others(adapter, method) for method in METHODS):
        return False, "its forward was replaced on the module; its PHM layers run one by one"
    others = {name for name, child in adapter.named_children() if child is not None}
    others -= {"down_sampler", "up_sampler", "activation"}
    methods = [name for name in METHODS if getattr(type(adapter), name, nn.Module.forward) is not nn.Module.forward]
    options: Options | str
    if others:
        options = f"it also holds {', '.join(sorted(others))}"
    elif len(methods) != 1:
        options = f"it has {len(methods)} of the methods {' and '.join(METHODS)}"
    else:
        formula = "up(act(down(x))), with or without + x"
        options = _probe(adapter, methods[0], formula, _in_one_kernel, _options(adapter.activation))
    if isinstance(options, str):
        return False, f"{options}; its PHM layers run one by one"
    put(adapter, methods[0], call, method=methods[0], **options)
    how = "one kernel, with the residual" if options["residual"] else "one kernel"
    return True, how if options["activation"] else f"{how}; its activation is called between the projections"


def _unset(*layers: Any) -> str:
    """The names of the weights that another module is to provide and has not set yet."""
    names: dict[str, None] = {}
    for layer in layers:
        rule = ("phm_rule_left", "phm_rule_right") if layer.factorized_phm_rule else ("phm_rule",)
        factors = ("W_left", "W_right") if _factorised(layer) else ("W",)
        names |= dict.fromkeys(name for name in rule + factors if not isinstance(getattr(layer, name, None), Tensor))
    return ", ".join(names)


def _options(activation: Any) -> Iterable[Options]:
    """The options of `call` that may fit an adapter with this activation, a fused one first."""
    inner = getattr(activation, "f", activation)  # the wrappers of activations have it in f
    names = (fused_name(activation), fused_name(inner), name_by_values(inner))
    for name in dict.fromkeys((*filter(None, names), None)):
        for residual in (False, True):
            yield {"activation": name, "residual": residual}


def _probe(module: Any, method: str, formula: str, function: Kernel, candidates: Iterable[Options]) -> Options | str:
    """The options with which the function computes what the method does, or why there are none."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            twin, layer = _drawn_anew(module), getattr(module, "down_sampler", module)
            x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
            for options in candidates:
                if _agrees(twin, method, x, function, options):
                    return options
    except Exception as error:  # the code of another library may raise anything; the module is then left as it is
        return f"asking its {method} failed: {type(error).__name__}: {error}"
    return f"its {method} computes something else than {formula}"


def _drawn_anew(module: nn.Module) -> nn.Module:
    """A copy on the CPU in float64 with random weights, which shares nothing with the module."""
    twin = copy.deepcopy(module).to_empty(device="cpu").double()
    for part in twin.modules():
        for table in hook_tables(part) or ():
            table.clear()
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                vars(part)[name] = torch.randn(value.shape, dtype=torch.float64)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.normal_()
    return twin


def _agrees(twin: nn.Module, method: str, x: Tensor, function: Kernel, options: Options) -> bool:
    """Whether both compute the same in evaluation and in training, where dropout acts."""
    for training in (False, True):
        twin.train(training)
        torch.manual_seed(1)
        y = function(twin, x, **options)
        torch.manual_seed(1)
        value = getattr(type(twin), method)(twin, x)
        if not isinstance(value, Tensor) or value.shape != y.shape or not torch.allclose(value, y, rtol=1e-8):
            return False
    return True

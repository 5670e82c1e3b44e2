"""PHM layers of other libraries, recognised by what they hold: those of `adapters`, OpenDelta, T-Few and the original.

All of them have the attributes of rabeehk/compacter's PHMLinear; in `adapters`, `factorized_phm` has another name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from compacter_kernels.functional import phm_linear
from compacter_kernels.nn import PHMLinear
from compacter_kernels.weights import PHMWeights, factorised_rule

ATTRIBUTES = ("in_features", "out_features", "phm_dim", "learn_phm", "factorized_phm_rule", "shared_phm_rule", "b")


def is_projection(module: Any) -> bool:
    """Whether this is a PHM layer of another library, built like the original PHMLinear."""
    return (
        isinstance(module, nn.Module)
        and not isinstance(module, PHMLinear)
        and all(hasattr(module, name) for name in ATTRIBUTES)
        and (hasattr(module, "factorized_phm") or hasattr(module, "factorized_phm_W"))
    )


def factorised(layer: nn.Module) -> bool:
    """Whether W is W_left W_right."""
    if "factorized_phm_W" in vars(layer):  # of `adapters`, where looking for the other takes a while
        return bool(layer.factorized_phm_W)
    return bool(layer.factorized_phm if hasattr(layer, "factorized_phm") else layer.factorized_phm_W)


def tensor_names(layer: nn.Module) -> tuple[str, ...]:
    """The attributes that hold the layer's weights, the bias apart."""
    rule = ("phm_rule_left", "phm_rule_right") if layer.factorized_phm_rule else ("phm_rule",)
    return (*rule, *(("W_left", "W_right") if factorised(layer) else ("W",)))


def missing(layer: nn.Module) -> list[str]:
    """The weights that are to come from elsewhere and have not been set."""
    return [name for name in tensor_names(layer) if not isinstance(getattr(layer, name, None), Tensor)]


def _tensor(holder: nn.Module, name: str) -> Any:
    """holder.name, in a fifth of the time that nn.Module takes to find a Parameter."""
    found = holder._parameters.get(name)
    return getattr(holder, name) if found is None else found


def weights(layer: Any, rules: Any = None, factors: Any = None, prefix: str = "W") -> PHMWeights:
    """The layer's weights, read anew, since a loaded checkpoint or a shared rule may replace them.

    rules, factors: the module that holds the rule and W, if it is not the layer; prefix: how W is called there.
    """
    rules, factors = layer if rules is None else rules, layer if factors is None else factors
    if layer.factorized_phm_rule:
        rule = factorised_rule(_tensor(rules, "phm_rule_left"), _tensor(rules, "phm_rule_right"))
    else:
        rule = _tensor(rules, "phm_rule")
    bias = _tensor(layer, "b")
    if factorised(layer):
        return PHMWeights(rule, _tensor(factors, f"{prefix}_left"), _tensor(factors, f"{prefix}_right"), bias)
    return PHMWeights(rule, _tensor(factors, prefix), None, bias)


def forward(layer: nn.Module, x: Tensor, phm_rule: Any = None) -> Tensor:
    """Instead of PHMLinear.forward; phm_rule has no effect there either."""
    return phm_linear(x, weights(layer))

"""PHM layers of other libraries: those of `adapters`, OpenDelta, T-Few and the original repository.

They are recognised by their attributes, which are those of PHMLinear in rabeehk/compacter. Only
`factorized_phm` has another name in `adapters`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from compacter_kernels.functional import phm_linear
from compacter_kernels.nn import PHMLinear
from compacter_kernels.private import parameter
from compacter_kernels.weights import PHMWeights, factorised_rule

ATTRIBUTES = ("in_features", "out_features", "phm_dim", "learn_phm", "factorized_phm_rule", "shared_phm_rule", "b")


def is_phm_layer(module: Any) -> bool:
    """Whether this is a PHM layer of another library, built like the original PHMLinear."""
    return (
        isinstance(module, nn.Module)
        and not isinstance(module, PHMLinear)
        and all(hasattr(module, name) for name in ATTRIBUTES)
        and (hasattr(module, "factorized_phm") or hasattr(module, "factorized_phm_W"))
    )


def _factorised(layer: Any) -> bool:
    """Whether W is W_left W_right."""
    if "factorized_phm_W" in vars(layer):  # `adapters`, where a search for the other name takes long
        return bool(layer.factorized_phm_W)
    return bool(layer.factorized_phm if hasattr(layer, "factorized_phm") else layer.factorized_phm_W)


def missing(layer: nn.Module) -> list[str]:
    """The weights that another module is to provide and has not set yet."""
    rule = ("phm_rule_left", "phm_rule_right") if layer.factorized_phm_rule else ("phm_rule",)
    factors = ("W_left", "W_right") if _factorised(layer) else ("W",)
    return [name for name in (*rule, *factors) if not isinstance(getattr(layer, name, None), Tensor)]


def weights(layer: Any, rules: Any, factors: Any, prefix: str = "W") -> PHMWeights:
    """The weights of the layer, read in every call: a checkpoint or a shared rule may replace them.

    rules, factors: the modules that hold the rule and W, often the layer itself. prefix: the name
    of W there.
    """
    if layer.factorized_phm_rule:
        rule = factorised_rule(parameter(rules, "phm_rule_left"), parameter(rules, "phm_rule_right"))
    else:
        rule = parameter(rules, "phm_rule")
    bias = parameter(layer, "b")
    if _factorised(layer):
        return PHMWeights(rule, parameter(factors, f"{prefix}_left"), parameter(factors, f"{prefix}_right"), bias)
    return PHMWeights(rule, parameter(factors, prefix), None, bias)


def forward(layer: nn.Module, x: Tensor, phm_rule: Any = None) -> Tensor:
    """Instead of PHMLinear.forward, where phm_rule has no effect either."""
    return phm_linear(x, weights(layer, layer, layer))

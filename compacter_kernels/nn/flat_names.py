"""Flat names for the parameters of adapters, as files and the library peft have them.

`compacter_down_W_left` stands for `down.W_left` of an adapter, and `compacter_shared_phm_rule` for
the `phm_rule` that all adapters share. Those of plain bottleneck adapters begin with
`bottleneck_adapter_`.
"""

from __future__ import annotations

PREFIX = "compacter_"
BOTTLENECK = "bottleneck_adapter_"
SHARED = "compacter_shared_"
_WEIGHTS = ("W_left", "W_right", "W", "phm_rule", "phm_rule_left", "phm_rule_right", "b")
_NAMES = (
    *(f"{projection}.{weight}" for projection in ("down", "up") for weight in (*_WEIGHTS, "weight", "bias")),
    *("scaling", "norm_before.weight", "norm_before.bias", "norm_after.weight", "norm_after.bias"),
)


def flat(name: str, prefix: str = PREFIX) -> str:
    """`compacter_down_W_left` for `down.W_left`."""
    return prefix + name.replace(".", "_")


_DOTTED = {name.replace(".", "_"): name for name in _NAMES}


def dotted(name: str, prefix: str = PREFIX) -> str | None:
    """`down.W_left` for `compacter_down_W_left`, and None for a name that no parameter has."""
    return _DOTTED.get(name.removeprefix(prefix)) if name.startswith(prefix) else None

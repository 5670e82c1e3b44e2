"""Methods put onto single modules, which can be taken off again and survive deepcopy and pickle.

Such a method is `functools.partial(function, module)` of a function of this folder. Copying the
module binds the method to the copy. The partial itself shows whose method it is; no mark is needed.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from compacter_kernels.private import hooked

NAMES = (
    *("forward", "post_forward", "compose_single", "bottleneck_layer_forward"),
    *("compose_batch_split", "compose_average", "_rebuild_forward", "bypass_forward"),
)


def is_ours(method: Any) -> bool:
    """Whether `put` made this method."""
    if type(method) is not functools.partial or type(method.func) is not types.FunctionType:
        return False
    return method.func.__module__.startswith("compacter_kernels.patch")


def put(module: nn.Module, name: str, function: Callable[..., Any], **options: Any) -> None:
    """Let `module.name(...)` call `function(module, ..., **options)`."""
    vars(module)[name] = functools.partial(function, module, **options)


def restore(module: nn.Module) -> list[str]:
    """Take off every method that `put` made, and return their names; a wrapped one stays."""
    names = [name for name in NAMES if is_ours(vars(module).get(name))]
    for name in names:
        del vars(module)[name]
    return names


def replaced_by_others(module: nn.Module, name: str) -> bool:
    """Whether another library has put a method of its own onto this module."""
    return name in vars(module) and not is_ours(vars(module)[name])


def runs_more(*modules: nn.Module) -> bool:
    """Whether a call of one runs a hook or a foreign forward, which a kernel would leave out."""
    for module in modules:
        if "forward" in vars(module) and not is_ours(vars(module)["forward"]):
            return True
    return hooked(*modules)

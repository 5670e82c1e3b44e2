"""Methods put onto single modules, so that they can be taken off again and survive deepcopy and pickle.

A method is `functools.partial(function, module)` of a function that can be imported: copies rebind it to the copied
module, and it can be told from whatever others put there without any other mark.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

PACKAGE = __name__.rpartition(".")[0]
METHODS = ("forward", "post_forward", "compose_single", "bottleneck_layer_forward")


def is_ours(method: Any) -> bool:
    """Whether this is a method that `put` made."""
    if type(method) is not functools.partial or type(method.func) is not types.FunctionType:
        return False
    return method.func.__module__.startswith(PACKAGE)


def put(module: nn.Module, name: str, function: Callable[..., Any], **options: Any) -> None:
    """Let `module.name(...)` be `function(module, ..., **options)`."""
    vars(module)[name] = functools.partial(function, module, **options)


def replaced_by_others(module: nn.Module, name: str) -> bool:
    """Whether another library has put a method of its own onto this module."""
    return name in vars(module) and not is_ours(vars(module)[name])


def restore(module: nn.Module) -> list[str]:
    """Take off whatever `put` made; the names of those methods. One that others have wrapped since stays."""
    names = [name for name in METHODS if is_ours(vars(module).get(name))]
    for name in names:
        del vars(module)[name]
    return names


def hooked(*modules: nn.Module) -> bool:
    """Whether calling one of these modules does more than its forward, which a kernel in its stead would not do."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
        if "forward" in vars(module) and not is_ours(vars(module)["forward"]):
            return True
    return False

"""Whether a module has to be called as one, since a kernel in its stead would leave something out."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from compacter_kernels.private import hooked


def runs(forward: Callable[..., Any], *modules: nn.Module) -> bool:
    """Whether a call of each of these modules runs `forward`, a function of their class, and nothing else.

    It does not where a hook is registered, nor where somebody has put another forward on the module itself, as
    accelerate does, nor for a module of another kind. Every call asks this, so that it only reads attributes.
    """
    for module in modules:
        if type(module).forward is not forward or (
            "forward" in module.__dict__ and module.__dict__["forward"] != MethodType(forward, module)
        ):
            return False
    return not hooked(*modules)

"""Whether a kernel may compute a module, or the module must be called to run its hooks."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from compacter_kernels.private import hooked


def runs(forward: Callable[..., Any], *modules: nn.Module) -> bool:
    """Whether a call of each module runs `forward`, a function of its class, and nothing else.

    It does not with hooks, of a module or of all modules (`register_module_forward_hook`), with
    another class, or if accelerate has set a forward on the module. It may leave the class's own
    forward there, which is allowed. Every call runs this check, which only reads attributes.
    """
    for module in modules:
        if type(module).forward is not forward or (
            "forward" in module.__dict__ and module.__dict__["forward"] != MethodType(forward, module)
        ):
            return False
    return not hooked(*modules)

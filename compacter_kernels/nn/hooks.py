"""Whether a module has to be called as one, since a kernel in its stead would leave something out."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook  # no public name says it, and a kernel would miss these hooks


def runs(forward: Callable[..., Any], *modules: nn.Module) -> bool:
    """Whether a call of each of these modules is `forward`, a function of their class, and nothing else.

    Not so with hooks, those of one module or of all (`register_module_forward_hook`), nor with a forward put on the
    module itself, as accelerate does, unless it is that of the class again, which accelerate leaves there; nor for a
    module of another kind. Asked in every call, it only reads attributes.
    """
    for module in modules:
        if (
            type(module).forward is not forward
            or module._forward_pre_hooks
            or module._forward_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or ("forward" in module.__dict__ and module.__dict__["forward"] != MethodType(forward, module))
        ):
            return False
    return not _has_any_global_hook()

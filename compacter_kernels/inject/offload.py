"""Modules whose weights accelerate has offloaded to the CPU or to disk.

The parameters of such a module are on "meta", except during a call of the module. Code that uses
the parameters without a call must load them first: for shared weights, for copies and for files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

# accelerate's attributes of a module: its hook, and the forward that was replaced.
HOOK, OLD_FORWARD = "_hf_hook", "_old_forward"
NOTHING = nullcontext()


def onloaded(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """A context in which the modules hold their weights, as during a call of them."""
    hooked = [(module, vars(module)[HOOK]) for module in modules if HOOK in vars(module)]
    return _onloaded(hooked) if hooked else NOTHING


@contextmanager
def _onloaded(hooked: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    for module, hook in hooked:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooked:
            hook.post_forward(module, None)


def device_of(module: nn.Module) -> torch.device:
    """The device that a module computes on. It is the CPU for a module without parameters."""
    for part in module.modules():
        hook = vars(part).get(HOOK)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.empty(0, device=device).device
    return next((p.device for p in module.parameters()), torch.device("cpu"))

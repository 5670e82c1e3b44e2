"""Modules whose weights accelerate keeps elsewhere (cpu_offload, disk_offload, a device_map with "cpu" or "disk").

Their parameters are on "meta" but within a call of the module that holds them. The owner of what adapters share is
read and not called, and so is whatever is copied or saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

ATTRIBUTES = ("_hf_hook", "_old_forward")  # accelerate's, on a module: its hook, and the forward that calls it replaces
NOTHING = nullcontext()


def offload_hook(module: nn.Module) -> Any:
    """accelerate's hook on a module, or None."""
    return vars(module).get(ATTRIBUTES[0])


def in_place(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Within it the modules hold their own weights, as in a call of them."""
    for module in modules:
        if ATTRIBUTES[0] in vars(module):
            return _hooked(modules)
    return NOTHING


@contextmanager
def _hooked(modules: Iterable[nn.Module]) -> Iterator[None]:
    hooked = [(module, hook) for module in modules if (hook := offload_hook(module)) is not None]
    for module, hook in hooked:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in hooked:
            hook.post_forward(module, None)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes; without parameters on the CPU."""
    for part in module.modules():
        hook = offload_hook(part)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.empty(0, device=device).device
    return next((p.device for p in module.parameters()), torch.device("cpu"))

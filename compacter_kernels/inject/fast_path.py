"""Switches off the fast path of torch's encoder, which does not call the modules in it.

In eval mode nn.TransformerEncoderLayer reads the weights of its linear layers and norms instead of
calling them, unless a module in it has hooks. nn.TransformerEncoder packs padded batches into
nested tensors for that. Both must be off while adapters are in use.
"""

from __future__ import annotations

from torch import nn

from compacter_kernels.inject.target_adapters import TargetAdapters
from compacter_kernels.targets.added import AddedModules

FLAGS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


class FastPath:
    """The torch encoders of a model that hold adapters or trained copies."""

    def __init__(self, model: nn.Module) -> None:
        encoders = [
            (module, flag)
            for module in model.modules()
            for kind, flag in FLAGS.items()
            if isinstance(module, kind) and any(isinstance(part, AddedModules) for part in module.modules())
        ]
        parts = dict.fromkeys(part for module, _ in encoders for part in module.modules())
        self._flags = [(module, flag, getattr(module, flag)) for module, flag in encoders]
        self._adapters = [part for part in parts if isinstance(part, TargetAdapters)]

    def allow(self, on: bool) -> None:
        """Restore the fast path, or switch it off. The adapters have hooks only while it is off."""
        for module, flag, value in self._flags:
            setattr(module, flag, value if on else type(value)(0))
        for adapters in self._adapters:
            adapters.remove_hooks() if on else adapters.register_hooks()

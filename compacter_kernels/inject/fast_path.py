"""torch's own encoder, which in eval computes past its modules.

nn.TransformerEncoderLayer then reads the weights of its linear layers and norms and calls none of them, unless some
module in it has hooks; nn.TransformerEncoder packs padded batches into nested tensors for that. Both are off while
adapters are in use, and as they were while none is.
"""

from __future__ import annotations

from torch import nn

from compacter_kernels.inject.target_adapters import AddedModules, TargetAdapters

FLAGS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


class FastPath:
    """The torch encoders of a model that hold adapters or trained copies."""

    def __init__(self, model: nn.Module) -> None:
        holders = [
            (module, flag)
            for module in model.modules()
            for kind, flag in FLAGS.items()
            if isinstance(module, kind) and any(isinstance(part, AddedModules) for part in module.modules())
        ]
        parts = [part for module, _ in holders for part in module.modules()]
        self._flags = [(module, flag, getattr(module, flag)) for module, flag in holders]
        self._slots = [part for part in dict.fromkeys(parts) if isinstance(part, TargetAdapters)]

    def allow(self, on: bool) -> None:
        """Let torch compute past the modules, or not."""
        for module, flag, value in self._flags:
            setattr(module, flag, value if on else type(value)(0))
        for slot in self._slots:
            slot.remove_hooks() if on else slot.register_hooks()

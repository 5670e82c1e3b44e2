"""The fast path of torch's encoders, which passes over adapters.

In eval mode nn.TransformerEncoderLayer reads the weights of its linear layers and norms instead of
calling them, unless a module in it has hooks. nn.TransformerEncoder packs padded batches into
nested tensors for that. Both must be off while adapters are in use.
"""

from __future__ import annotations

from torch import nn

FLAGS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}


class FastPath:
    """Switches the fast path of the torch encoders in a model that hold modules of a class."""

    def __init__(self, model: nn.Module, held: type = nn.Module) -> None:
        self._flags = [
            (module, flag, getattr(module, flag))
            for module in model.modules()
            for kind, flag in FLAGS.items()
            if isinstance(module, kind) and any(isinstance(part, held) for part in module.modules())
        ]
        self._against: set[object] = set()

    @property
    def encoders(self) -> list[nn.Module]:
        """The encoders and their layers."""
        return [module for module, *_ in self._flags]

    def allow(self, on: bool, asker: object = None) -> None:
        """Switch the fast path off, or restore it once all that have asked for this allow it."""
        (self._against.discard if on else self._against.add)(asker)
        for module, flag, value in self._flags:
            setattr(module, flag, type(value)(0) if self._against else value)

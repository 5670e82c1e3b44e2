"""The memory that a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd saves in `forward()`, each once, beyond those of the known tensors."""
    addresses = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}  # alive, so addresses differ
    del out
    return sum(size for address, size in found.items() if address not in addresses)

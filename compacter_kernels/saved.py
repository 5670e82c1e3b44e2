"""The memory that a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Return the bytes of the storages that autograd saves in `forward()`.

    Each storage counts once, and those of the known tensors do not count.
    """
    addresses = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    storages = [tensor.untyped_storage() for tensor in kept]  # all alive, so that addresses differ
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for address, size in sizes.items() if address not in addresses)

"""The memory that a call keeps for its backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compacter_kernels.accuracy import Case


def saved_bytes(bind: Callable[[Case], Callable[[], Tensor]], case: Case) -> int:
    """Bytes of the storages that autograd saves in `bind(case)()`, beyond those of the inputs and the parameters."""
    case = case.map(lambda t: t.detach().requires_grad_())
    known = {tensor.untyped_storage().data_ptr() for tensor in case.tensors().values()}
    kept: list[Tensor] = []
    call = bind(case)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}  # alive, so addresses differ
    del out
    return sum(size for address, size in found.items() if address not in known)

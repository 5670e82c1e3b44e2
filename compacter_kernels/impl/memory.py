"""The check that a tensor has memory, and enough of it, before a kernel gets its address.

Sharding and offloading leave parameters whose storage has been freed, and a tensor subclass may
have no storage of its own. An address shows neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from compacter_kernels import modes
from compacter_kernels.calls import ORDINARY
from compacter_kernels.impl.module import TENSORS
from compacter_kernels.problem import Problem
from compacter_kernels.weights import LinearWeights, PHMWeights

_storage, _nbytes = Tensor.untyped_storage, torch.UntypedStorage.nbytes
_offset, _is_contiguous, _data_ptr = Tensor.storage_offset, Tensor.is_contiguous, Tensor.data_ptr
_REMEMBERED = 4096  # tuples of addresses; a model has one tuple for each of its adapters
_NO_MEMORY = (
    "{name} has no memory that a kernel can read: {why}. Pass a tensor that holds its values; for a sharded, offloaded "
    "or wrapped one, call the module that gathers it, or pass what it stands for (full_tensor() of a DTensor)"
)


class NoStorageError(RuntimeError):
    """A tensor has no storage: it wraps another tensor, or has a layout of its own."""


def check_memory(tensor: Tensor, name: str) -> None:
    """Raise RuntimeError unless every element of a tensor with any strides lies in its storage."""
    if not tensor.numel():
        return
    try:
        storage = tensor.untyped_storage()
        nbytes, address = storage.nbytes(), storage.data_ptr()
    except (NotImplementedError, RuntimeError) as error:
        raise NoStorageError(_NO_MEMORY.format(name=name, why=str(error).splitlines()[0])) from error
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    if nbytes < needed:
        why = f"its storage has {nbytes} of {needed} bytes, as freed storage has"
        raise RuntimeError(_NO_MEMORY.format(name=name, why=why))
    if not address or tensor.is_nested:
        kind = "nested tensor" if tensor.is_nested else f"{type(tensor).__name__} on {tensor.device}"
        raise RuntimeError(_NO_MEMORY.format(name=name, why=f"it is a {kind}"))


def check_all(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Check the memory of each of these tensors, which come with their names."""
    for name, tensor in tensors:
        check_readable(tensor, name)


def check_for_torch(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Check ordinary tensors that torch itself reads or writes, in a call that is eager alone."""
    if not torch.compiler.is_compiling() and modes.alone():
        check_all((name, tensor) for name, tensor in tensors if tensor.__class__ in ORDINARY)


def check_readable(tensor: Tensor, name: str) -> None:
    """Do what `check_memory` does, in less time. A tensor on meta has no memory and passes."""
    if (not tensor.is_contiguous() or _too_short(tensor)) and not tensor.is_meta:
        check_memory(tensor, name)


def readable(tensor: Tensor, name: str) -> Tensor:
    """Return the tensor, or a contiguous copy of it. Raises as `check_memory`."""
    try:
        contiguous = tensor.is_contiguous()
    except RuntimeError:  # raised for a sparse tensor, which check_memory names
        contiguous = False
    if contiguous and tensor.__class__ in ORDINARY and not tensor.is_neg() and not _too_short(tensor):
        return tensor
    check_memory(tensor, name)
    return tensor.contiguous().resolve_neg()


def _too_short(tensor: Tensor) -> bool:
    """Whether the storage of a contiguous tensor ends before the tensor, or is missing."""
    try:
        nbytes, offset = _nbytes(_storage(tensor)), _offset(tensor)
    except (NotImplementedError, RuntimeError):
        return True
    return nbytes < (tensor.nbytes + offset * tensor.element_size() if offset else tensor.nbytes)


class Parameters:
    """The check of a problem's parameters, made once for each tuple of their addresses.

    Storage that is freed or resized moves or has the address 0, and is then checked again.
    """

    def __init__(self, problem: Problem) -> None:
        sides = ("weights",) if problem.operation == "linear" else ("down", "up")
        fields = LinearWeights._fields if problem.operation == "bottleneck" else PHMWeights._fields
        self.names = [f"{side}.{field}" for side in sides for field in fields]
        self.has_all = all(None not in p.dtypes for p in problem.projections)
        self.checked: set[tuple[int, ...]] = set()

    def readable(self, tensors: Sequence[Tensor | None]) -> tuple[Sequence[Tensor | None], tuple[int, ...]]:
        """Return what `readable` does for each parameter, and the addresses (0: absent)."""
        known: Any = None
        if self.has_all and TENSORS is not None:
            known = TENSORS.addresses(tuple(tensors))  # None where one is not contiguous or has none
        elif self.has_all:
            with suppress(RuntimeError):
                known = tuple(map(_data_ptr, tensors)) if all(map(_is_contiguous, tensors)) else None  # type: ignore[arg-type]
        if known in self.checked:
            return tensors, known
        params = [None if t is None else readable(t, name) for t, name in zip(tensors, self.names, strict=True)]
        if known is None or any(p is not t for p, t in zip(params, tensors, strict=True)):  # a copy was made
            return params, addresses(params)
        if len(self.checked) >= _REMEMBERED:
            self.checked.clear()
        self.checked.add(known)
        return params, known


def addresses(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    """Return the addresses of the tensors, 0 for one that is absent."""
    return tuple([0 if t is None else t.data_ptr() for t in tensors])

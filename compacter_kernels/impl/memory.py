"""The memory of tensors, looked at before a kernel gets their addresses: it is there, and large enough.

Sharding and offloading leave parameters whose storage has been freed, and a tensor subclass may have none of its own.
An address says neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from compacter_kernels.calls import ordinary
from compacter_kernels.problem import Problem

_storage, _nbytes = Tensor.untyped_storage, torch.UntypedStorage.nbytes
_offset, _is_contiguous, _data_ptr = Tensor.storage_offset, Tensor.is_contiguous, Tensor.data_ptr
_NO_MEMORY = (
    "{name} has no memory that a kernel can read: {why}. Pass a tensor that holds its values; for a sharded, offloaded "
    "or wrapped one, call the module that gathers it, or pass what it stands for (full_tensor() of a DTensor)"
)


class NoStorageError(RuntimeError):
    """A tensor has no storage at all: it wraps another, or has a layout of its own."""


def check_memory(tensor: Tensor, name: str) -> None:
    """Raise unless there is memory behind every element of a tensor, whatever its strides.

    Raises:
        RuntimeError: the message names the tensor. `NoStorageError` is one.
    """
    if not tensor.numel():
        return
    try:
        storage = tensor.untyped_storage()
        there, address = storage.nbytes(), storage.data_ptr()
    except (NotImplementedError, RuntimeError) as error:
        raise NoStorageError(_NO_MEMORY.format(name=name, why=str(error).splitlines()[0])) from error
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    if there < needed:
        why = f"its storage has {there} of {needed} bytes, as freed storage has"
        raise RuntimeError(_NO_MEMORY.format(name=name, why=why))
    if not address or tensor.is_nested:
        raise RuntimeError(_NO_MEMORY.format(name=name, why=f"it is a {_kind(tensor)}"))


def check_all(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """`check_memory` for each of these, by its name."""
    for name, tensor in tensors:
        if not tensor.is_meta and (not tensor.is_contiguous() or _too_short(tensor)):
            check_memory(tensor, name)


def _kind(tensor: Tensor) -> str:
    return "nested tensor" if tensor.is_nested else f"{type(tensor).__name__} on {tensor.device}"


def readable(tensor: Tensor, name: str) -> Tensor:
    """The tensor, or a contiguous copy of it; raises as `check_memory`."""
    if not tensor.is_contiguous() or tensor.is_neg() or _too_short(tensor) or not ordinary(tensor):
        check_memory(tensor, name)
        return tensor.contiguous().resolve_neg()
    return tensor


def _too_short(tensor: Tensor) -> bool:
    """Whether the storage ends before a contiguous tensor does, or is that of a tensor that has none."""
    try:
        there = _nbytes(_storage(tensor))
    except (NotImplementedError, RuntimeError):
        return True
    offset = _offset(tensor)
    return there < (tensor.nbytes + offset * tensor.element_size() if offset else tensor.nbytes)


class Parameters:
    """The parameters of a problem's projections: their names, and the bytes that each takes."""

    def __init__(self, problem: Problem) -> None:
        sides = ("weights",) if problem.operation == "linear" else ("down", "up")
        self.names, self.sizes = [], []
        for side, p in zip(sides, problem.projections, strict=True):
            n, rank = p.phm_dim, p.rank or 0
            counts = (n**3, p.in_features * rank, rank * p.out_features, p.out_features)
            for field, count, dtype in zip(("rule", "left", "right", "bias"), counts, p.dtypes, strict=True):
                self.names.append(f"{side}.{field}")
                self.sizes.append(None if dtype is None else count * dtype.itemsize)
        self.has_all = None not in self.sizes

    def readable(self, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Each parameter, or a contiguous copy of it; raises as `check_memory`."""
        if self.has_all and all(map(_is_contiguous, tensors)):  # type: ignore[arg-type]
            try:
                whole = [*map(_nbytes, map(_storage, tensors))] == self.sizes  # type: ignore[arg-type]
            except (NotImplementedError, RuntimeError):
                whole = False
            if whole and not any(map(_offset, tensors)):  # type: ignore[arg-type]
                return tensors
        return [None if t is None else readable(t, name) for t, name in zip(tensors, self.names, strict=True)]

    def addresses(self, tensors: Sequence[Tensor | None]) -> list[int]:
        """Where readable parameters are; 0 for one that is absent."""
        return list(map(_data_ptr, tensors)) if self.has_all else addresses(tensors)  # type: ignore[arg-type]


def addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    """Where the tensors are; 0 for one that is absent."""
    return [0 if t is None else t.data_ptr() for t in tensors]

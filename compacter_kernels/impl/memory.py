"""The memory of tensors, looked at before a kernel gets their addresses: it is there, and large enough.

Sharding and offloading leave parameters whose storage has been freed, and a tensor subclass may have none of its own.
An address says neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from compacter_kernels import modes
from compacter_kernels.calls import ORDINARY
from compacter_kernels.impl.module import TENSORS
from compacter_kernels.problem import Problem
from compacter_kernels.weights import PHMWeights

_storage, _nbytes = Tensor.untyped_storage, torch.UntypedStorage.nbytes
_offset, _is_contiguous, _data_ptr = Tensor.storage_offset, Tensor.is_contiguous, Tensor.data_ptr
_REMEMBERED = 4096  # places; a model has one for each of its adapters
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
        check_readable(tensor, name)


def check_for_torch(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """`check_all` for tensors that torch itself reads or writes, where they are ordinary and nobody else takes part."""
    if not torch.compiler.is_compiling() and modes.alone():
        check_all((name, tensor) for name, tensor in tensors if tensor.__class__ in ORDINARY)


def check_readable(tensor: Tensor, name: str) -> None:
    """`check_memory` in less time, where there may be numbers at all."""
    if (not tensor.is_contiguous() or _too_short(tensor)) and not tensor.is_meta:
        check_memory(tensor, name)


def _kind(tensor: Tensor) -> str:
    return "nested tensor" if tensor.is_nested else f"{type(tensor).__name__} on {tensor.device}"


def readable(tensor: Tensor, name: str) -> Tensor:
    """The tensor, or a contiguous copy of it; raises as `check_memory`."""
    if tensor.is_contiguous() and tensor.__class__ in ORDINARY and not tensor.is_neg() and not _too_short(tensor):
        return tensor
    check_memory(tensor, name)
    return tensor.contiguous().resolve_neg()


def _too_short(tensor: Tensor) -> bool:
    """Whether the storage ends before a contiguous tensor does, or there is none."""
    try:
        there, offset = _nbytes(_storage(tensor)), _offset(tensor)
    except (NotImplementedError, RuntimeError):
        return True
    return there < (tensor.nbytes + offset * tensor.element_size() if offset else tensor.nbytes)


class Parameters:
    """The parameters of a problem's projections, all found readable once for each place where they lie.

    Storage that is freed or resized moves, or has the address 0, so that it is looked at again.
    """

    def __init__(self, problem: Problem) -> None:
        sides = ("weights",) if problem.operation == "linear" else ("down", "up")
        self.names = [f"{side}.{field}" for side in sides for field in PHMWeights._fields]
        self.has_all = all(None not in p.dtypes for p in problem.projections)
        self.seen: set[tuple[int, ...]] = set()

    def readable(self, tensors: Sequence[Tensor | None]) -> tuple[Sequence[Tensor | None], tuple[int, ...]]:
        """Each parameter, or a contiguous copy of it, and where they are (0: absent); raises as `check_memory`."""
        places = self._places(tuple(tensors)) if self.has_all else None  # type: ignore[arg-type]
        if places in self.seen:
            return tensors, places
        found = self._looked_at(tensors)
        if places is None:
            return found, addresses(found)
        if len(self.seen) >= _REMEMBERED:
            self.seen.clear()
        self.seen.add(places)
        return found, places

    def _places(self, tensors: tuple[Tensor, ...]) -> tuple[int, ...] | None:
        """Where contiguous tensors are; None where one is not contiguous, or has no address."""
        if TENSORS is not None:
            return TENSORS.places(tensors)  # type: ignore[no-any-return]
        try:
            return tuple(map(_data_ptr, tensors)) if all(map(_is_contiguous, tensors)) else None
        except RuntimeError:
            return None

    def _looked_at(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if t is None else readable(t, name) for t, name in zip(tensors, self.names, strict=True)]


def addresses(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    """Where the tensors are; 0 for one that is absent."""
    return tuple([0 if t is None else t.data_ptr() for t in tensors])

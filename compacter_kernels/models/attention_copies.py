"""The copies that the library `adapters` makes of query, key and value in every attention.

Its Parallel composition can leave them with batches of different size, so all three are repeated to the largest. Where
the sizes agree, as they do everywhere else, that is `tensor.repeat(1, 1, 1, 1)`: a copy, with a backward of its own.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

from torch import Tensor

from compacter_kernels.models.report import Entry

NAME = "match_attn_matrices_for_parallel"
ENTRY = Entry(f"adapters.composition.{NAME}", "no copies where the batches agree, for every model of this process")

_original: list[Any] = []  # the library's function while ours stands in for it
_users: weakref.WeakSet[Any] = weakref.WeakSet()  # the patched models, and the library where it is patched as a whole


def matched(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Instead of match_attn_matrices_for_parallel."""
    if query.shape[0] == key.shape[0] == value.shape[0]:
        return query, key, value
    repeated: tuple[Tensor, ...] = _original[0](query, key, value)
    return repeated


def leave_out(user: Any) -> None:
    """Make no such copies from now on, for this user among others."""
    if not _original:
        _original.append(getattr(sys.modules["adapters.composition"], NAME))
        _swap(_original[0], matched)
    _users.add(user)


def put_back(user: Any) -> bool:
    """Let the library copy as before, unless another user remains; whether that is what happened."""
    if user not in _users:
        return False
    _users.remove(user)
    if _users:
        return False
    _swap(matched, _original.pop())
    return True


def _swap(old: Any, new: Any) -> None:
    """In every module of the library that has imported the function."""
    for name, module in list(sys.modules.items()):
        if name.startswith("adapters.") and vars(module).get(NAME) is old:
            setattr(module, NAME, new)

"""Parameters that ZeRO stage 3 of DeepSpeed keeps in pieces, one in each process.

Such a parameter is empty and has its shape in `ds_shape`. DeepSpeed itself is not imported here: whoever has such
parameters has done it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def full_shape(tensor: Tensor) -> torch.Size:
    """The shape that the whole tensor has."""
    return getattr(tensor, "ds_shape", tensor.shape)


def gathered(tensors: Iterable[Tensor], *, change: bool = False) -> AbstractContextManager[Any]:
    """A context in which those of the tensors that are in pieces are whole; all processes must enter it.

    change: what is written there stays, as rank 0 wrote it.

    Raises:
        RuntimeError: parameters of a DeepSpeed that is not there.
    """
    pieces = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not pieces:
        return nullcontext()
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is None:
        raise RuntimeError("the model has parameters in pieces, as of DeepSpeed's zero.Init; import deepspeed first")
    writer = 0 if change else None
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(pieces, modifier_rank=writer)
    return context

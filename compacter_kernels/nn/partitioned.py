"""Parameters that DeepSpeed's ZeRO stage 3 keeps in pieces, one in each process.

Such a parameter is empty, and `ds_shape` holds its shape. This module does not import DeepSpeed:
a program that has such parameters has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def full_shape(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    return getattr(tensor, "ds_shape", tensor.shape)


def gathered(tensors: Iterable[Tensor], *, change: bool = False) -> AbstractContextManager[Any]:
    """A context in which partitioned tensors are whole. All processes must enter it.

    change: whether the values that rank 0 writes in the context are kept. RuntimeError: tensors are
    partitioned, but DeepSpeed is not imported.
    """
    pieces = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not pieces:
        return nullcontext()
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is None:
        raise RuntimeError("the model has parameters in pieces, as of DeepSpeed's zero.Init; import deepspeed first")
    return deepspeed.zero.GatheredParameters(pieces, modifier_rank=0 if change else None)  # type: ignore[no-any-return]

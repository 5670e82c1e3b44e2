"""What the names of parameters say: the model's base, layer norms, heads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from compacter_kernels.targets.sites import HEADS
from compacter_kernels.targets.wrappers import plain_names

_BASE = r"bert|roberta|electra|distilbert|vit|wav2vec2|model|transformer(?=\.(?:h|encoder|decoder|shared_parameters)\.)"


def names_in_base(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by their names in the base of the plain model.

    For example, `module.bert.encoder...` of DistributedDataParallel becomes `encoder...`.

    Raises:
        ValueError: Two tensors would have one name.
    """
    tensors = plain_names(tensors)
    in_base = {re.sub(rf"^(?:{_BASE})\.", "", key): tensor for key, tensor in tensors.items()}
    if len(in_base) < len(tensors):
        twice = next(key for key in in_base if key in tensors and any(k.endswith(f".{key}") for k in tensors))
        raise ValueError(f"{twice} is in it twice, in the model's base and beside it")
    return in_base


def is_norm(key: str) -> bool:
    """Whether a parameter belongs to a layer norm, as the families of the table name theirs."""
    module = key.rpartition(".")[0].rpartition(".")[2].lower()
    return "norm" in module or module in ("ln_1", "ln_2", "ln_f", "ln_cross_attn")


def head_of(key: str) -> str | None:
    """Return the name of the head that a parameter belongs to, or None."""
    first = key.partition(".")[0]
    return first if first in HEADS else None


def heads_in(keys: Iterable[str]) -> list[str]:
    """Return the names of the heads that the parameters belong to."""
    return sorted({head for key in keys if (head := head_of(key))})

"""The names of tensors in files of earlier versions: of the format, and of peft."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from compacter_kernels.nn.flat_names import BOTTLENECK, PREFIX, SHARED, dotted, flat

Value = TypeVar("Value")
_OF_ADAPTER = ("down", "up", "scaling", "norm_before", "norm_after")


def todays_names(tensors: Mapping[str, Value], config: Mapping[str, Any]) -> dict[str, Value]:
    """The tensors of a file by today's names. config: the content of the file beside it.

    peft before 0.20 also writes what other adapters of the model have, under
    `...dense.compacter_down_b.NAME`. These tensors are left out.
    """
    if config.get("format_version") == 1:
        return _names_of_version_1(tensors)
    return {key: tensor for key, tensor in tensors.items() if not _is_of_another(key)}


def _is_of_another(key: str) -> bool:
    kind = key.rpartition(".")[0].rpartition(".")[2]
    return kind.startswith(SHARED) or any(dotted(kind, prefix) for prefix in (PREFIX, BOTTLENECK))


def _names_of_version_1(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """The tensors of a file of version 1 by today's names.

    It had `encoder.layer.0.output.dense.compacter.down.W_left`, `compacter.shared.phm_rule` and
    `classifier.compacter.weight`.
    """
    named = {}
    for key, tensor in tensors.items():
        path, found, rest = f".{key}".rpartition(".compacter.")
        if not found:
            named[key] = tensor
        elif not path:
            named[SHARED + rest.removeprefix("shared.")] = tensor
        else:
            name = flat(rest) if rest.partition(".")[0] in _OF_ADAPTER else rest
            named[f"{path.removeprefix('.')}.{name}"] = tensor
    return named


def adapted_modules(names: Iterable[str], prefix: str = PREFIX) -> list[str]:
    """The modules that have adapters, for today's names of tensors."""
    return sorted({key.rpartition(".")[0] for key in names if dotted(key.rpartition(".")[2], prefix)})

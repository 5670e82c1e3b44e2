"""What the config file of an adapter folder says: the format's version, the options, the model they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from compacter_kernels.checkpoints.files import DIGEST
from compacter_kernels.config import CompacterConfig

VERSION = 1
PEFT_TYPE = "COMPACTER"
OF_MODEL = ("model_type", "hidden_size", "num_hidden_layers")


def describe(model: nn.Module) -> dict[str, Any]:
    """What a config says beside the options: the format, and the model that the adapters belong to."""
    config = getattr(model, "config", None)
    return {
        "peft_type": PEFT_TYPE,
        "format_version": VERSION,
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        **of_model(model),
    }


def of_model(model: nn.Module) -> dict[str, Any]:
    """The type and the sizes by which a model is known again, None where it has no such."""
    found = {key: getattr(getattr(model, "config", None), key, None) for key in OF_MODEL}
    return {key: value if isinstance(value, str | int) else None for key, value in found.items()}


def read_config(found: Mapping[str, Any], path: Path) -> CompacterConfig:
    """The options in a config file's content.

    Raises:
        ValueError: of another method or version, or options that are unknown or do not fit.
    """
    kind, version = found.get("peft_type"), found.get("format_version")
    if kind != PEFT_TYPE:
        raise ValueError(
            f"{path} has peft_type {kind!r}, not {PEFT_TYPE!r}; compacter-kernels convert reads other formats"
        )
    if version != VERSION or isinstance(version, bool):
        raise ValueError(f"{path} has format_version {version!r}; this compacter_kernels reads version {VERSION}")
    beside = {"peft_type", "format_version", "base_model_name_or_path", DIGEST, *of_model(nn.Module())}
    try:
        return CompacterConfig.from_dict({key: value for key, value in found.items() if key not in beside})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error

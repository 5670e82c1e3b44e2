"""The config file of an adapter folder: the format's version, the options, the base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from compacter_kernels.checkpoints.files import DIGEST
from compacter_kernels.config import CompacterConfig

PEFT_TYPE, VERSION = "COMPACTER", 1
FORMAT = {"peft_type": PEFT_TYPE, "format_version": VERSION}
MODEL = {"base_model_name_or_path": str, "model_type": str, "hidden_size": int, "num_hidden_layers": int}


def about_model(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config file says of the base model, with None for a value of another type."""
    return {key: content[key] if isinstance(content.get(key), kind) else None for key, kind in MODEL.items()}


def of_model(model: nn.Module) -> dict[str, Any]:
    """Return what `about_model` returns, from the config of a model."""
    config = getattr(model, "config", None)
    return about_model({key: getattr(config, key.removeprefix("base_model"), None) or None for key in MODEL})


def read_config(content: Mapping[str, Any], path: Path) -> CompacterConfig:
    """Return the options in the content of a config file; `path` is for error messages.

    Raises:
        ValueError: The file is of another method or version, or has options that are unknown or do
            not fit.
    """
    kind, version = content.get("peft_type"), content.get("format_version")
    if kind != PEFT_TYPE:
        raise ValueError(
            f"{path} has peft_type {kind!r}, not {PEFT_TYPE!r}; compacter-kernels convert reads other formats"
        )
    if version != VERSION or isinstance(version, bool):
        raise ValueError(f"{path} has format_version {version!r}; this compacter_kernels reads version {VERSION}")
    no_options = {*FORMAT, *MODEL, DIGEST}
    try:
        return CompacterConfig.from_dict({key: value for key, value in content.items() if key not in no_options})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
